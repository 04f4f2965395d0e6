"""Shards: many independent rows, computed in pieces, collected into one file.

requests → plan (immutable; batches and shards) → attempts (one journal each, resumed from earlier
ones) → done.json (first publisher wins) → collect (checks everything, writes in request order).
This room knows files; it knows no model and no scheduler.
"""

from medtrain.shards.collect import UnsoundShardError
from medtrain.shards.drive import (
    CollectOnly,
    attempt_units,
    collect_only,
    missing_units,
    open_phase,
    rows_finished,
    run_here,
    take_for_dead,
)
from medtrain.shards.plan import Plan, Request, make_plan
from medtrain.shards.progress import Progress, shard_progress
from medtrain.shards.shard_set import Drive, Phase, ShardSet, ShardSummary, Unit, Work, closing_sets

__all__ = [
    "CollectOnly",
    "Drive",
    "Phase",
    "Plan",
    "Progress",
    "Request",
    "ShardSet",
    "ShardSummary",
    "Unit",
    "UnsoundShardError",
    "Work",
    "attempt_units",
    "closing_sets",
    "collect_only",
    "make_plan",
    "missing_units",
    "open_phase",
    "rows_finished",
    "run_here",
    "shard_progress",
    "take_for_dead",
]
