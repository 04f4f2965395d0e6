"""The loop over the table of stages: run what is missing.

For each stage: fingerprint (settings + digests of inputs) → finished under the same one: skip →
otherwise say why, put aside what another fingerprint made, run, publish the receipt. A stage that
was killed starts again with what it left behind.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medtrain import beforehand, stages
from medtrain.config import RunConfig, dump_config
from medtrain.console import Console, is_rank_zero
from medtrain.endpoint import load_secrets
from medtrain.errors import DataError, MedtrainError, as_medtrain_error
from medtrain.files import write_json, write_text
from medtrain.inputs import anchored, portable
from medtrain.launch import IN_JOB_VARIABLE, check_launch, launch
from medtrain.lineage import Fingerprint, Lineage, Standing, choose, flatten, versions
from medtrain.run import Run
from medtrain.selection import Selection
from medtrain.shards import CollectOnly, Drive, UnsoundShardError, run_here
from medtrain.stage import Stage, summary

_PEER_WAIT_S = 120.0


DriveOf = Callable[[Stage], Drive]
"""Who computes the shards of a stage."""


def run_stages(
    run: Run,
    config: RunConfig,
    console: Console,
    selection: Selection | None = None,
    drive_of: DriveOf = lambda stage: run_here,
) -> None:
    """Run the selected stages that are not finished.

    Raises:
        MedtrainError: whatever ended a stage; everything finished before it stays finished.
    """
    selection = selection or Selection()
    chosen = selection.stages()
    pipeline = Pipeline(run, config, console)
    load_secrets(config.cluster.secrets_file)
    beforehand.check_place(run)
    # A command that is refused leaves the run, and its configuration, as they are.
    pipeline.check_before(chosen[0])
    undone = pipeline.undone(chosen, selection.force)
    beforehand.check_key(config, {stage.name for stage in undone})
    # A job keeps a refusal for whoever waits for it; `launch` sees to that.
    if IN_JOB_VARIABLE not in os.environ and any(stage.trains for stage in undone):
        beforehand.check_packages(config)
        check_launch(config)
    run.create()
    with run.lock() if is_rank_zero() else nullcontext():
        if is_rank_zero():
            write_text(run.config, dump_config(anchored(config)))
        for stage in chosen:
            pipeline.bring(stage, force=stage.name in selection.force, drive=drive_of(stage))


class Pipeline:
    """The stages of one run under one configuration."""

    def __init__(self, run: Run, config: RunConfig, console: Console) -> None:
        self.run, self.config, self.console = run, config, console
        self.lineage = Lineage(run)
        self._flat = flatten(config.model_dump(mode="json"))

    def fingerprint(self, stage: Stage) -> Fingerprint:
        """What the stage's result depends on, now.

        Raises:
            DataError: an input has not been made yet.
        """
        inputs = {
            path.relative_to(self.run.root).as_posix(): self.lineage.input_digest(path)
            for path in stage.reads(self.run, self.config)
        }
        inputs.update(stage.outside(self.run, self.config))
        return Fingerprint(self._settings(stage), inputs, stage.split)

    def standing(self, stage: Stage) -> Standing:
        """Where the stage stands; one that the run does not have is done.

        Where its inputs are gone, a finished stage still counts if nothing else has changed.
        """
        if not stage.wanted(self.config):
            return Standing("done")
        try:
            return self.lineage.standing(stage.name, self.fingerprint(stage))
        except DataError:
            receipt = self.lineage.receipt(stage.name)
            if receipt is None:
                return Standing("missing")
            made = all(self.lineage.was_made(path) for path in stage.reads(self.run, self.config))
            if made and receipt["settings"] == self._settings(stage):
                damaged = self.lineage.damaged_output(receipt)
                return Standing("stale", damaged) if damaged else Standing("done")
            return Standing("stale", "its inputs are missing")

    def _settings(self, stage: Stage) -> dict[str, Any]:
        return portable(choose(self._flat, stage.settings, stage.ignores))

    def check_before(self, first: Stage) -> None:
        """Refuse to start in the middle of a run whose earlier stages do not hold."""
        for stage in stages.needed_before(first, self.run, self.config):
            standing = self.standing(stage)
            if standing.state != "done":
                reason = f" ({standing.why})" if standing.why else ""
                raise DataError(
                    f"{first.name} needs {stage.name}, which is {standing.state}{reason}",
                    fix=f"Bring it up to date: medtrain run {self.run.config} --until {first.name}",
                )
        if self.standing(first).state != "done":
            self.fingerprint(first)  # raises where an input is not there

    def undone(self, chosen: Sequence[Stage], force: Collection[str] = ()) -> list[Stage]:
        """The stages that are to be run, or run again."""
        return [s for s in chosen if s.name in force or self.standing(s).state != "done"]

    def begin(self, stage: Stage) -> bool:
        """Mark a sharded stage as begun, before its shards are computed elsewhere.

        False where it is finished already.

        Raises:
            DataError: an input has not been made yet.
        """
        fingerprint = self.fingerprint(stage)
        standing = self.lineage.standing(stage.name, fingerprint)
        if standing.state == "done":
            self._say_skipped(stage)
            return False
        self._begin(stage, fingerprint, standing)
        return True

    def forget(self, stage: Stage) -> None:
        """Have a stage run from its beginning: what it made is removed or put aside."""
        self.lineage.forget(stage.name)
        self._remove(stage)
        for path in stage.shards(self.run, self.config):
            self._put_aside(stage, path)

    def bring(self, stage: Stage, *, force: bool = False, drive: Drive = run_here) -> None:
        """Finish one stage: skip it, go on with it, or run it."""
        if not stage.wanted(self.config):
            self.console.event(
                "stage_skip",
                f"{stage.name:<10} not needed with these settings",
                mark="skip",
                stage=stage.name,
            )
            return
        try:
            fingerprint = self.fingerprint(stage)
        except DataError:
            # Its data may be gone from a scratch disk; what was made of it stands.
            if force or self.standing(stage).state != "done":
                raise
            self._say_skipped(stage)
            return
        standing = self.lineage.standing(stage.name, fingerprint)
        if force and is_rank_zero():
            self.forget(stage)
            standing = Standing("stale", "--force")
        elif standing.state == "done":
            self._say_skipped(stage)
            return
        if not (stage.trains and launch(self.run, self.config, stage.name, self.console)):
            self._run_here(stage, fingerprint, standing, drive)

    def _run_here(
        self, stage: Stage, fingerprint: Fingerprint, standing: Standing, drive: Drive
    ) -> None:
        if is_rank_zero():
            self._begin(stage, fingerprint, standing)
        else:
            self._wait_for_rank_zero(stage, fingerprint)
        began = time.monotonic()
        try:
            counts = stage.run(self.run, self.config, self.console, drive)
        except UnsoundShardError:
            raise  # whoever computes the shards elsewhere has them computed again
        except Exception as error:
            self.lineage.record_failure(stage.name, as_medtrain_error(error))
            raise
        if is_rank_zero():
            seconds = time.monotonic() - began
            if isinstance(drive, CollectOnly):  # the work was done before, by others
                seconds = time.time() - self.lineage.began_at(stage.name)
            self._finish(stage, fingerprint, counts, seconds)

    def _finish(
        self, stage: Stage, fingerprint: Fingerprint, counts: Mapping[str, Any], seconds: float
    ) -> None:
        outputs = stage.writes(self.run, self.config)
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        self.lineage.finish(stage.name, fingerprint, outputs, counts, seconds, stamp)
        write_manifest(self.run, self.config)
        self.console.event(
            "stage_done",
            f"{stage.name:<10} {seconds:6.1f} s  {summary(counts)}",
            mark="done",
            stage=stage.name,
            seconds=round(seconds, 1),
            **{key: value for key, value in counts.items() if isinstance(value, (int, float, str))},
        )

    def _begin(self, stage: Stage, fingerprint: Fingerprint, standing: Standing) -> None:
        resumed = standing.state == "started" and self.lineage.goes_on(stage.name, fingerprint)
        # How far a training can go on, its checkpoints say.
        again = "begun before" if stage.trains else "going on where it stopped"
        why = standing.why or (again if resumed else "")
        if not resumed and standing.state != "missing":
            self._remove(stage)
            why = why or "settings changed since it stopped"
        self.lineage.start(stage.name, fingerprint)
        self.console.event(
            "stage_start",
            f"{stage.name:<10} {stage.title}" + (f" ({why})" if why else ""),
            mark="start",
            stage=stage.name,
            **({"why": why} if why else {}),
        )

    def _remove(self, stage: Stage) -> None:
        """Take away what another fingerprint made; what was trained is kept aside, once."""
        for path in stage.clears(self.run, self.config):
            if path.name in ("adapter", "checkpoints"):
                self._put_aside(stage, path)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _put_aside(self, stage: Stage, path: Path) -> None:
        if path.exists():
            aside = self.run.root / "superseded" / stage.name
            shutil.rmtree(aside / path.name, ignore_errors=True)
            aside.mkdir(parents=True, exist_ok=True)
            path.rename(aside / path.name)

    def _wait_for_rank_zero(self, stage: Stage, fingerprint: Fingerprint) -> None:
        """Until rank zero has put old outputs aside and begun."""
        deadline = time.monotonic() + _PEER_WAIT_S
        while self.lineage.started(stage.name) != fingerprint.digest:
            if time.monotonic() > deadline:
                raise MedtrainError(f"Rank zero did not start {stage.name}")
            time.sleep(0.05)

    def _say_skipped(self, stage: Stage) -> None:
        receipt = self.lineage.receipt(stage.name)
        counts = receipt["counts"] if receipt else {}
        self.console.event(
            "stage_skip",
            f"{stage.name:<10} finished before  {summary(counts)}",
            mark="skip",
            stage=stage.name,
        )


def write_manifest(run: Run, config: RunConfig) -> None:
    """Roll the receipts up into the run's lineage manifest."""
    lineage = Lineage(run)
    known = ((stage.name, lineage.receipt(stage.name)) for stage in stages.stages_of(config))
    receipts = {name: receipt for name, receipt in known if receipt is not None}
    write_json(
        run.manifest,
        {"name": run.name, "seed": config.seed, "versions": versions(), "stages": receipts},
    )


def table(run: Run, config: RunConfig) -> Sequence[tuple[Stage, Standing, dict[str, Any] | None]]:
    """Every stage with where it stands and its receipt."""
    pipeline = Pipeline(run, config, Console(quiet=True))
    known = stages.stages_of(config)
    return [(s, pipeline.standing(s), pipeline.lineage.receipt(s.name)) for s in known]
