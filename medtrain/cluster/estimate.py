"""What the jobs of a chain are likely to take.

a job's steps → seconds of each: what this run measured where it did (receipts of stages, of shards,
checkpoints), else FLOPs and bytes (medtrain.cluster.workload) at the speed of a GPU
(medtrain.gpus) → seconds of a task. What is finished of a stage that has begun is taken
off. Nothing is touched, no model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from medtrain.cluster.chain import ChainJob, phase_of
from medtrain.cluster.decoding import Decoders, Decoding, decoding_s
from medtrain.cluster.hardware import Hardware
from medtrain.cluster.ledger import Step
from medtrain.cluster.workload import (
    VERDICT_TOKENS,
    flops_a_token,
    judged,
    orders,
    reference_tokens,
    sizes_of,
    training_load,
    words,
)
from medtrain.config import GenerateConfig, RunConfig, VariantConfig
from medtrain.gpus import (
    LOAD_BYTES_PER_S,
    START_S,
    STEP_FLOOR_S,
    parameters_of,
)
from medtrain.lineage import Standing
from medtrain.run import Run, Trained
from medtrain.shards import Request
from medtrain.shards.costs import CostModel, measured_costs
from medtrain.shards.progress import shard_progress
from medtrain.stage import Stage
from medtrain.status.sharded import shard_directory
from medtrain.status.training import training_progress

Basis = Literal["measured", "estimated", "short", "unknown"]
"""Where seconds come from; `short`: minutes of a CPU, which nobody counts."""

_JUDGE_BATCH = 8
"""Of medtrain.judge.model_judge; importing it would import more than a plan needs."""


class Took(NamedTuple):
    """What a step takes in all, and each of its tasks before it computes."""

    seconds: float | None
    basis: Basis
    load_s: float = 0.0
    note: str = ""


_SET_THE_PACE = ("batch_size", "gradient_accumulation", "max_length", "epochs", "max_steps")
_IN_ORDERS = ("verdicts", "pairwise")
"""Shard sets whose rows are put to the judge once an order."""
_SHORT = Took(0.0, "short")
_UNKNOWN = Took(None, "unknown")


class Estimator:
    """What the steps of one run take."""

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        known: Sequence[tuple[Stage, Standing, dict[str, Any] | None]],
    ) -> None:
        self.run, self.config = run, config
        self.standing = {stage.name: standing.state for stage, standing, _ in known}
        self.receipts = {stage.name: receipt for stage, _, receipt in known if receipt}
        self.sizes = sizes_of(run, config, prepared=self.standing["prepare"] == "done")
        self.hardware = Hardware(run, config)
        self.parameters = self.hardware.parameters

    def task(self, job: ChainJob) -> Took:
        """What one task of a job takes; the seconds include loading."""
        tasks = max(1, len(job.tasks))
        took = [self._step(step, job) for step in job.steps]
        known = [one.seconds for one in took if one.seconds is not None]
        load_s = max((one.load_s for one in took), default=0.0)
        seconds = sum(known) / tasks + load_s if len(known) == len(took) else None
        bases = [one.basis for one in took if one.basis != "short"]
        return Took(
            seconds=seconds if bases else None,
            basis=bases[0] if bases else "short",
            load_s=load_s,
            note="; ".join(one.note for one in took if one.note),
        )

    def _step(self, step: Step, job: ChainJob) -> Took:
        verb, name, _ = step
        if verb in ("open", "close"):
            return _SHORT
        if verb == "train":
            return self._training(cast("Trained", name))
        if verb == "shards":
            if phase_of(step).kind == "judge":
                return self._judging(cast("Literal['judge', 'evaluate']", name), job)
            if name == "reference":
                return self._reference(job)
            return self._answering(name, job) if name in ("generate", "evaluate") else _UNKNOWN
        if (receipt := self.receipts.get(name)) is not None:
            return Took(receipt["seconds"], "measured")
        return self._merging() if name.startswith("merge") else _SHORT

    # Training and merging

    def _training(self, stage: Trained) -> Took:
        measured = self._steps_measured(stage)
        if measured is not None:
            return Took(measured, "measured", self.hardware.load_s(stage))
        processes = self.hardware.processes(stage)
        load = training_load(self.config, self.sizes, stage, processes)
        if not processes or load.tokens is None or self.parameters is None:
            return _UNKNOWN
        flops = self._flops(stage, load.tokens) * self._left(stage)
        note = f"{words(load.tokens)} tokens"
        reached = self._flops_measured() if stage == "dpo" else None
        if reached is not None:
            return Took(
                flops / reached,
                "measured",
                self.hardware.load_s(stage),
                f"{note}, at the pace of sft",
            )
        seconds = self.hardware.gpu(stage).compute_s(flops, self.config.model.dtype) / processes
        return Took(seconds, "estimated", self.hardware.load_s(stage), note)

    def _flops(self, stage: Trained, tokens: float) -> float:
        assert self.parameters is not None
        checkpointing = self.hardware.choice(stage).checkpointing
        return tokens * flops_a_token(self.parameters, checkpointing=checkpointing)

    def _reference(self, job: ChainJob) -> Took:
        """A forward pass of both answers of every pair."""
        tokens = reference_tokens(self.config, self.sizes)
        if tokens is None or self.parameters is None or not self.hardware.gpus(job.kind):
            return _UNKNOWN
        flops = 2 * self.parameters * tokens * self._rows_left("reference", job)
        seconds = self.hardware.gpu(job.kind).compute_s(flops, self.config.model.dtype)
        return Took(seconds, "estimated", self.hardware.load_s(job.kind), f"{words(tokens)} tokens")

    def _steps_measured(self, stage: Trained) -> float | None:
        """What it took before, where something was changed that costs no time."""
        receipt, section = self.receipts.get(stage), getattr(self.config, stage)
        if receipt is None:
            return None
        then = receipt["settings"]
        same = all(then.get(f"{stage}.{key}") == getattr(section, key) for key in _SET_THE_PACE)
        # Settings keep of a local path its name.
        base = self.config.model.base
        same = same and then.get("model.base") in (base, Path(base).name)
        return float(receipt["seconds"]) if same else None

    def _flops_measured(self) -> float | None:
        """FLOP/s that DPO would reach at SFT's pace, if that is done as it is configured."""
        if self.standing["sft"] != "done" or "sft" not in self.receipts or self.parameters is None:
            return None
        processes = self.hardware.processes("sft")
        load = training_load(self.config, self.sizes, "sft", processes)
        if load.tokens is None or not processes:
            return None
        a_second = self._flops("sft", load.tokens) / float(self.receipts["sft"]["seconds"])
        return a_second / processes * self.hardware.processes("dpo")

    def _left(self, stage: Trained) -> float:
        """The share of a training's steps that its checkpoints do not hold yet."""
        amount = training_progress(self.run, stage) if self.standing[stage] == "started" else None
        return 1 - amount.done / amount.total if amount is not None else 1.0

    def _merging(self) -> Took:
        """Read for the comparison, read again, written, read back."""
        if self.parameters is None:
            return _SHORT if self.config.model.base.startswith("builtin:") else _UNKNOWN
        seconds = 4 * self.parameters * self.hardware.bytes_each("merge") / LOAD_BYTES_PER_S
        return Took(seconds, "estimated", START_S)

    # Shards

    def _answering(self, stage: str, job: ChainJob) -> Took:
        section = self.config.generate if stage == "generate" else self.config.evaluate
        rows = self.sizes.prompts if stage == "generate" else self.sizes.eval
        samples = section.num_samples if isinstance(section, GenerateConfig) else 1
        models = self._models(stage)
        note = "" if rows is None else f"{words(rows * samples * len(models))} answers"
        if section.engine == "openai":
            note = f"{note} of an endpoint".strip()
        measured = self._costs(stage, job)
        if not rows:
            return _SHORT if rows == 0 else _UNKNOWN
        share = self._rows_left(stage, job)
        if measured is not None:
            request = Request(
                "", {}, prompt_tokens=round(self.sizes.prompt_tokens),
                max_answer_tokens=samples * section.max_new_tokens,
            )  # fmt: skip
            seconds = measured.seconds(request) * rows * len(models) * share
            return Took(seconds, "measured", self.hardware.load_s(job.kind), note)
        known = [parameters for parameters in models if parameters is not None]
        if (
            section.engine == "openai"
            or not self.hardware.gpus(job.kind)
            or len(known) < len(models)
        ):
            return Took(None, "unknown", note=note)
        work = Decoding(section, rows, samples, self.sizes.prompt_tokens)
        machine = Decoders(
            self.hardware.gpu(job.kind),
            self.hardware.architecture,
            self.config.model.dtype,
            self.hardware.bytes_each(job.kind),
        )
        seconds = sum(decoding_s(work, machine, parameters) for parameters in known)
        return Took(seconds * share, "estimated", self.hardware.load_s(job.kind, max(known)), note)

    def _models(self, stage: str) -> list[float | None]:
        """Parameters of the models that answer."""
        if stage == "generate":
            return [self.parameters]
        return [
            parameters_of(v.path) if isinstance(v, VariantConfig) else self.parameters
            for v in self.config.evaluate.variants
        ]

    def _costs(self, stage: str, job: ChainJob) -> CostModel | None:
        """Fitted to this stage's own finished shards, else to those of `generate`."""
        keys = [key for key in _keys(job) if not key.startswith("loss.")]
        places = [shard_directory(self.run, stage, key) for key in keys]
        found = (measured_costs(place) for place in (*places, self.run.generate))
        return next((costs for costs in found if costs is not None), None)

    def _judging(self, stage: Literal["judge", "evaluate"], job: ChainJob) -> Took:
        asked = judged(self.config, self.sizes, stage)
        judge = self.config.judge
        if judge.kind == "rules":
            return _SHORT
        if asked is None:
            return _UNKNOWN
        note = f"{words(asked.calls)} calls, {words(asked.tokens)} tokens"
        share = self._rows_left(stage, job)
        a_call = self._call_s(stage, _keys(job)) or self._call_s("judge", ["verdicts"])
        if a_call is not None:
            return Took(a_call * asked.calls * share, "measured", START_S, note)
        parameters = parameters_of(judge.model) if judge.kind == "model" else None
        if parameters is None or not self.hardware.gpus(job.kind):
            return Took(None, "unknown", note=note)
        gpu = self.hardware.gpu(job.kind)
        floor = STEP_FLOOR_S["transformers"]
        dtype, each = self.config.model.dtype, self.hardware.bytes_each(job.kind)
        a_step = gpu.decode_step_s(parameters, each, _JUDGE_BATCH, floor, dtype)
        seconds = ceil(asked.calls / _JUDGE_BATCH) * min(judge.max_tokens, VERDICT_TOKENS) * a_step
        seconds += gpu.compute_s(2 * parameters * asked.calls * asked.prompt_tokens, dtype)
        return Took(seconds * share, "estimated", self.hardware.load_s(job.kind, parameters), note)

    def _call_s(self, stage: str, keys: Sequence[str]) -> float | None:
        """Seconds of one question to the judge, by finished shards."""
        seconds = calls = 0.0
        for key in keys:
            seen = shard_progress(shard_directory(self.run, stage, key))
            # Shards are cut to equal cost, so that each holds about as many rows.
            rows = seen.total * seen.shards_done / max(1, seen.shards_total)
            calls += rows * (orders(self.config.judge) if key in _IN_ORDERS else 1)
            seconds += seen.seconds
        return seconds / calls if calls and seconds else None

    def _rows_left(self, stage: str, job: ChainJob) -> float:
        """The share of an array's rows that no shard has finished yet."""
        if self.standing[stage] != "started":
            return 1.0
        seen = [shard_progress(shard_directory(self.run, stage, key)) for key in _keys(job)]
        total = sum(one.total for one in seen)
        return 1 - sum(one.done for one in seen) / total if total else 1.0


def _keys(job: ChainJob) -> list[str]:
    """The shard sets that an array computes."""
    return list(dict.fromkeys(key for units in job.tasks for key, _ in units))
