"""Where a run stands: one row a stage, what is going on, and the command that goes on.

receipts, marks and shard files → StageStatus of every stage → RunStatus, which draws itself
This room reads files, changes nothing and imports nothing heavy. It knows of jobs only what it is
told: medtrain.cluster.board lays what Slurm says over the same rows.
"""

from medtrain.status.advice import Advice
from medtrain.status.facts import Amount, Failure, GpuTime, Jobs, Shards, StageStatus
from medtrain.status.look import RunStatus, run_status

__all__ = [
    "Advice",
    "Amount",
    "Failure",
    "GpuTime",
    "Jobs",
    "RunStatus",
    "Shards",
    "StageStatus",
    "run_status",
]
