"""submitit's Slurm executor, with what a dispatcher of shards needs and without its traps.

- Options that nobody asked for are not sent (a default of five minutes, a wckey).
- One log a task; the site's setup lines, and the job ends where one of them fails.
- Submitting from inside a job leaks nothing of that job into the next.
- The python of jobs, or a container before it, is kept for arrays too.
- What sbatch says when it refuses is the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from medtrain.cluster.requeue import requeue_lines
from medtrain.cluster.sbatch import outside_of_a_job, refused
from medtrain.cluster.site import Options, setup_lines
from medtrain.config import RunConfig


class ArrayExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Sends callables as one job, or as one array."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        options: Options,
        config: RunConfig,
        python: str,
        parallelism: int,
    ) -> None:
        super().__init__(folder, max_num_timeout=config.cluster.max_requeues, python=python)
        own = dict(options)
        cpus = own.get("cpus-per-task")
        self.update_parameters(
            job_name=name,
            time=int(own.pop("time")),
            comment=str(own.pop("comment")),
            signal_delay_s=config.cluster.signal_delay_s,
            array_parallelism=parallelism,
            stderr_to_stdout=True,
            setup=[*setup_lines(config), "set +e"],
            teardown=requeue_lines(config.cluster.max_requeues),
            # srun does not take over the batch job's cores by itself.
            srun_args=[*([f"--cpus-per-task={cpus}"] if cpus else []), *config.cluster.srun],
            wckey=None,
            additional_parameters=own,
        )

    @classmethod
    def affinity(cls) -> int:
        """Available, also where a dry run finds no Slurm."""
        return 2

    def send(self, tasks: Sequence[Callable[[], Any]]) -> str:
        """Submit; the id that sbatch gave.

        Raises:
            ConfigError: sbatch refuses.
            SlurmUnreachableError: Slurm does not answer.
        """
        delayed = [utils.DelayedSubmission(task) for task in tasks]
        try:
            # What sbatch says is the error's to tell, once.
            with outside_of_a_job(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                jobs = self._internal_process_submissions(delayed)
        except (utils.FailedJobError, utils.FailedSubmissionError) as error:
            raise refused(str(error)) from error
        return str(jobs[0].job_id).partition("_")[0]

    def script(self, count: int) -> str:
        """The batch script of an array of `count` tasks, or of a single job."""
        if count > 1:
            self.parameters["map_count"] = count
        return str(self._make_submission_file_text(self._submitit_command_str, ""))
