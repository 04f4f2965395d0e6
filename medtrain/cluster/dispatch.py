"""Handing one job of a chain to Slurm.

intent in the ledger → script and arguments in the job's folder → sbatch → job ids in the ledger.
Arrays and the short jobs between them go through submitit, which writes the script, carries the
arguments (a few words each), and requeues a job that runs into its time limit or is preempted;
training goes through slurm/train.sbatch, which a person can submit as well.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from medtrain.cluster.chain import ChainJob
from medtrain.cluster.intents import settle
from medtrain.cluster.ledger import NO_REPAIR, Condition, Ledger, Repair, Submission
from medtrain.cluster.sbatch import flags, sbatch, train_script
from medtrain.cluster.site import (
    Options,
    batch_python,
    job_python,
    sbatch_options,
    setup_lines,
    total_gpus,
)
from medtrain.cluster.slurm import Slurm, SlurmUnreachableError
from medtrain.config import RunConfig
from medtrain.errors import TryAgainError
from medtrain.files import write_text
from medtrain.run import Run

DEFAULT_MAX_ARRAY_SIZE = 1001
"""Slurm's own default: array indices are lower than this."""
_LOG_PATTERN = "%j_0_log.out"


@dataclass(frozen=True, slots=True)
class Script:
    """What is given to sbatch."""

    command: tuple[str, ...]
    """sbatch and its arguments; empty where submitit calls it."""
    text: str
    """The batch script."""
    sourced: str = ""
    """What the batch script sources: the setup lines of a training job."""


class Dispatcher:
    """Submits the jobs of one run."""

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        *,
        max_array_size: int = DEFAULT_MAX_ARRAY_SIZE,
        chain: str = "",
        numbers: Counter[str] | None = None,
    ) -> None:
        """Submits for `run`.

        Args:
            run: the run.
            config: what jobs ask for.
            max_array_size: Slurm's MaxArraySize.
            chain: that the jobs belong to.
            numbers: `Ledger.next_numbers()` of the moment in which it was decided what to submit.
        """
        self.run = Run(run.root.absolute())
        self.config = config
        self.ledger = Ledger(self.run)
        self._max_array_size = max_array_size
        self._chain = chain
        self._numbers = numbers if numbers is not None else self.ledger.next_numbers()

    def submit(
        self,
        job: ChainJob,
        waits_for: Mapping[str, Sequence[str]],
        *,
        repair: Repair = NO_REPAIR,
        extra: Options | None = None,
    ) -> Submission:
        """Submit a job once.

        Args:
            job: what is to be done.
            waits_for: key → job ids of the jobs it depends on; a key that is not there is done.
            repair: the round of repair it belongs to.
            extra: options of sbatch besides those of the configuration.

        Raises:
            TryAgainError: somebody else submits the same job at this moment.
            ConfigError: sbatch refuses it.
            SlurmUnreachableError: Slurm does not answer.
        """
        intent = self._intend(job, repair)
        dependency = dependency_of(job.after, waits_for)
        options = self._options(job, intent, dependency, extra or {})
        try:
            ids, starts = self._sbatch(job, intent, options)
        except Exception:
            # sbatch may have failed after Slurm took the job. Where that cannot be asked, the
            # intent stays open, and the next submission settles it.
            with suppress(SlurmUnreachableError):
                settled = settle(self.run, Slurm(), intent)
                if settled.job_ids:
                    return settled
            raise
        noted = self.ledger.note(intent, ids, starts)
        if noted.job_ids != tuple(ids):
            Slurm().cancel(ids)
            raise _submitted_by_another(self.run, job.key)
        return noted

    def _intend(self, job: ChainJob, repair: Repair) -> Submission:
        number = self._numbers[job.key]
        intent = self.ledger.intend(
            job.key,
            steps=job.steps,
            after=job.after,
            tasks=job.tasks,
            gpus=total_gpus(self.config, job.kind),
            chain=self._chain,
            repair=repair,
            number=number,
        )
        if intent is None:
            raise _submitted_by_another(self.run, job.key)
        self._numbers[job.key] = number + 1
        return intent

    def scripts(self, job: ChainJob) -> list[Script]:
        """What `submit` would hand to sbatch, without a trace: names stand for job ids."""
        intent = Submission(job.key, 0, nonce="<nonce>", steps=job.steps, tasks=job.tasks)
        named = {key: [f"<{key}>"] for key, _ in job.after}
        options = self._options(job, intent, dependency_of(job.after, named), {})
        if job.trains:
            return [self._train_script(job, intent, options)]
        chunks = self._chunks(len(job.tasks)) if job.tasks else [range(1)]
        return [
            Script((), self._executor(intent, options, len(chunks)).script(len(chunk)))
            for chunk in chunks
        ]

    def _sbatch(
        self, job: ChainJob, intent: Submission, options: Options
    ) -> tuple[list[str], list[int]]:
        folder = self.run.job_folder(intent.key, intent.number)
        folder.mkdir(parents=True)
        if job.trains:
            script = self._train_script(job, intent, options)
            write_text(folder / "setup.sh", script.sourced)
            return [sbatch(script.command)], [0]
        from medtrain.cluster.tasks import ChainTask, ShardTask

        if not job.tasks:
            task = ChainTask(str(self.run.root), intent.key, intent.number)
            return [self._executor(intent, options, 1).send([task])], [0]
        chunks = self._chunks(len(job.tasks))
        executor = self._executor(intent, options, len(chunks))
        ids = [
            executor.send(
                [ShardTask(str(self.run.root), intent.key, intent.number, i) for i in chunk]
            )
            for chunk in chunks
        ]
        return ids, [chunk.start for chunk in chunks]

    def _chunks(self, count: int) -> list[range]:
        size = self._max_array_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _options(
        self, job: ChainJob, intent: Submission, dependency: str, extra: Options
    ) -> Options:
        options = sbatch_options(self.config, job.kind)
        options["comment"] = intent.comment
        if dependency:
            options["dependency"] = dependency
            # Else a job whose predecessor failed would wait for ever.
            options["kill-on-invalid-dep"] = "yes"
        if "exclude" in options and "exclude" in extra:
            extra = {**extra, "exclude": f"{options['exclude']},{extra['exclude']}"}
        return {**options, **extra}

    def _executor(self, intent: Submission, options: Options, arrays: int) -> Any:
        from medtrain.cluster.executor import ArrayExecutor

        return ArrayExecutor(
            self.run.job_folder(intent.key, intent.number),
            name=f"{self.run.name}-{intent.key}",
            options=options,
            config=self.config,
            python=job_python(self.config),
            parallelism=max(1, self.config.cluster.parallelism // arrays),
        )

    def _train_script(self, job: ChainJob, intent: Submission, options: Options) -> Script:
        script = train_script()
        folder = self.run.job_folder(intent.key, intent.number)
        given = {
            **options,
            "job-name": f"{self.run.name}-{intent.key}",
            "output": str(folder / _LOG_PATTERN),
            "signal": f"B:USR1@{self.config.cluster.signal_delay_s}",
        }
        stage = job.steps[0][1]
        # Not by environment: a site may keep that from jobs.
        arguments = ["--setup", str(folder / "setup.sh"), stage, str(self.run.root)]
        command = ["sbatch", "--parsable", *flags(given), str(script), *arguments]
        python = f"export MEDTRAIN_PYTHON={shlex.quote(batch_python(self.config))}"
        sourced = "\n".join([*setup_lines(self.config), python]) + "\n"
        return Script(tuple(command), script.read_text(encoding="utf-8"), sourced)


def _submitted_by_another(run: Run, key: str) -> TryAgainError:
    return TryAgainError(
        f"Another medtrain submits {key} of this run at this moment",
        fix=f"See what is queued: medtrain status {run.root}",
    )


def dependency_of(
    after: Sequence[tuple[str, Condition]], waits_for: Mapping[str, Sequence[str]]
) -> str:
    """sbatch's `--dependency`; empty where there is nothing to wait for."""
    return ",".join(
        ":".join([condition, *waits_for[key]]) for key, condition in after if waits_for.get(key)
    )
