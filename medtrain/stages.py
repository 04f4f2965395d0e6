"""The table of stages: what each reads, writes, depends on, and the function that does it.

prepare → sft → merge-sft → generate → judge → pairs → reference → dpo → merge-dpo → evaluate →
report
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medtrain import inputs
from medtrain.config import RunConfig
from medtrain.run import Run, Trained
from medtrain.shards import Unit
from medtrain.stage import Artefacts, PhaseRow, Stage


def _built_base(run: Run, config: RunConfig) -> list[Path]:
    return [run.built_base] if config.model.base.startswith("builtin:") else []


def _evaluated_models(run: Run, config: RunConfig) -> list[Path]:
    names = [v for v in config.evaluate.variants if isinstance(v, str)]
    merged = [run.merged(name) for name in names if name != "base"]
    return merged + (_built_base(run, config) if "base" in names else [])


def _evaluate_writes(run: Run, config: RunConfig) -> list[Path]:
    names = [v if isinstance(v, str) else v.name for v in config.evaluate.variants]
    return [run.scores, run.evaluation_rows, *(run.answers(name) for name in names)]


def _merge(stage: Trained) -> Stage:
    return Stage(
        name=f"merge-{stage}",
        title=f"merge the {stage.upper()} adapter into a plain model",
        work="medtrain.train.merge:merge_adapter",
        arguments={"stage": stage},
        settings=("merge", "model"),
        ignores=("model.attention", "merge.kl_warn_nats"),
        reads=lambda run, config: [
            run.adapter(stage), run.tokenizer, run.eval_rows, *_built_base(run, config),
        ],
        outside=inputs.base_files,
        writes=lambda run, config: [run.merged(stage)],
        clears=lambda run, config: [run.merged(stage)],
    )  # fmt: skip


# `train.processes` is left out on purpose: the machine at hand must not decide whether a finished
# training counts.
_TRAINING_IGNORES = (
    "eval_batch_size", "log_every", "activation_checkpointing", "checkpoint_steps",
    "max_bad_batches",
)  # fmt: skip
_STEP_SPLIT = ("batch_size", "gradient_accumulation")


def _train(stage: Trained, title: str, reads: Artefacts) -> Stage:
    def trained(run: Run, config: RunConfig) -> list[Path]:
        return [run.adapter(stage), run.metrics(stage)]

    return Stage(
        name=stage,
        title=title,
        work=f"medtrain.train.{stage}:train_{stage}",
        trains=True,
        settings=("seed", "model", stage),
        ignores=(*(f"{stage}.{key}" for key in _TRAINING_IGNORES), "dpo.reference_shards",
                 "model.system_prompt"),
        split=tuple(f"{stage}.{key}" for key in _STEP_SPLIT),
        reads=lambda run, config: [
            run.tokenizer, *reads(run, config), *_built_base(run, config),
        ],
        outside=inputs.base_files,
        writes=trained,
        clears=lambda run, config: [*trained(run, config), run.checkpoints(stage)],
    )  # fmt: skip


_ENGINE_IGNORES = ("base_url", "api_key_env", "batch_size", "decoding", "num_shards")
_JUDGE_IGNORES = (
    "judge.base_url", "judge.api_key_env", "judge.concurrency", "judge.timeout_s",
    "judge.max_retries", "judge.max_failed_fraction", "judge.num_shards",
)  # fmt: skip


def _each_shard(groups: Sequence[tuple[str, ...]], num_shards: int) -> list[tuple[Unit, ...]]:
    """A task for each shard of each group of sets that share a model."""
    return [tuple((key, shard) for key in group) for group in groups for shard in range(num_shards)]


def _of_variants(config: RunConfig) -> list[tuple[str, ...]]:
    names = [v if isinstance(v, str) else v.name for v in config.evaluate.variants]
    with_loss = config.evaluate.held_out_loss and config.evaluate.engine == "transformers"
    kinds = ("answers", "loss") if with_loss else ("answers",)
    return [tuple(f"{kind}.{name}" for kind in kinds) for name in names]


def _protocols(config: RunConfig) -> list[tuple[str, ...]]:
    from medtrain.evaluate.judging import protocols

    return [(name,) for name in protocols(config.evaluate)]


# A page that shows settings is made of them, also of those that happened to change no result.
_SHOWN = ("model", "sft", "dpo", "merge", "generate", "judge", "evaluate")
_SHOWN_IGNORES = (
    *_JUDGE_IGNORES,
    *(f"{stage}.{key}" for stage in ("sft", "dpo") for key in _TRAINING_IGNORES),
    *(f"{stage}.{key}" for stage in ("generate", "evaluate") for key in _ENGINE_IGNORES),
    "model.attention", "merge.kl_prompts", "merge.kl_warn_nats", "merge.max_shard_size",
    "dpo.reference_shards",
)  # fmt: skip

STAGES: tuple[Stage, ...] = (
    Stage(
        name="prepare",
        title="read, clean, deduplicate and split the data",
        work="medtrain.data.prepare:prepare",
        settings=("data", "model.base", "model.revision", "model.chat_template",
                  "model.system_prompt", "model.trust_remote_code", "sft.max_length",
                  "sft.loss_on", "dpo.max_length"),
        outside=inputs.prepare_inputs,
        writes=lambda run, config: [run.data],
    ),
    _train("sft", "supervised fine-tuning of the adapter", lambda run, config: [run.train_rows]),
    _merge("sft"),
    Stage(
        name="generate",
        title="sample candidate answers for the preference prompts",
        work="medtrain.generate.stage:generate",
        settings=("seed", "generate", "model.dtype"),
        ignores=tuple(f"generate.{key}" for key in _ENGINE_IGNORES),
        reads=lambda run, config: [run.preference_prompts, run.tokenizer, run.merged("sft")],
        writes=lambda run, config: [run.candidates],
        shards=lambda run, config: [run.generate],
        phases=(
            PhaseRow(
                "candidates",
                "medtrain.generate.stage:phase_of_candidates",
                "generate",
                lambda config: _each_shard([("candidates",)], config.generate.num_shards),
            ),
        ),
    ),
    Stage(
        name="judge",
        title="compare the candidates of each prompt",
        work="medtrain.judge.stage:judge",
        settings=("judge",),
        ignores=(*_JUDGE_IGNORES, "judge.rating_scale"),
        reads=lambda run, config: [run.preference_prompts, run.candidates],
        outside=inputs.judge_files,
        writes=lambda run, config: [run.verdicts],
        shards=lambda run, config: [run.judge],
        phases=(
            PhaseRow(
                "verdicts",
                "medtrain.judge.stage:phase_of_verdicts",
                "judge",
                lambda config: _each_shard([("verdicts",)], config.judge.num_shards),
            ),
        ),
    ),
    Stage(
        name="pairs",
        title="turn verdicts into preference pairs",
        work="medtrain.judge.pairs:build_pairs",
        settings=(),
        reads=lambda run, config: [
            run.preference_prompts, run.ready_preferences, run.candidates, run.verdicts,
        ],
        writes=lambda run, config: [run.preferences, run.pairs],
    ),
    Stage(
        name="reference",
        title="log-probabilities of the preference pairs under the SFT model",
        work="medtrain.train.reference:compute_reference",
        settings=("model", "dpo.max_length", "dpo.packing", "dpo.method"),
        ignores=("model.system_prompt",),
        reads=lambda run, config: [
            run.tokenizer, run.preferences, run.adapter("sft"), *_built_base(run, config),
        ],
        outside=inputs.base_files,
        writes=lambda run, config: [run.reference],
        shards=lambda run, config: [run.reference_shards],
        wanted=lambda config: config.dpo.needs_reference,
        phases=(
            PhaseRow(
                "sums",
                "medtrain.train.reference:phase_of_sums",
                "reference",
                lambda config: _each_shard([("sums",)], config.dpo.reference_shards),
            ),
        ),
    ),
    _train(
        "dpo",
        "train the adapter on the preferences",
        lambda run, config: [
            run.preferences, run.adapter("sft"),
            *([run.reference] if config.dpo.needs_reference else []),
        ],
    ),
    _merge("dpo"),
    Stage(
        name="evaluate",
        title="answer the evaluation questions with every model, score and judge them",
        work="medtrain.evaluate.stage:evaluate",
        settings=("seed", "evaluate", "judge", "model"),
        ignores=(*_JUDGE_IGNORES, *(f"evaluate.{key}" for key in _ENGINE_IGNORES),
                 "model.system_prompt", "model.attention", "model.quantization",
                 "model.double_quantization"),
        reads=lambda run, config: [run.eval_rows, run.tokenizer, *_evaluated_models(run, config)],
        outside=inputs.evaluated_models,
        writes=_evaluate_writes,
        shards=lambda run, config: [run.evaluate],
        phases=(
            PhaseRow(
                "answers",
                "medtrain.evaluate.stage:phase_of_answers",
                "evaluate",
                lambda config: _each_shard(_of_variants(config), config.evaluate.num_shards),
            ),
            PhaseRow(
                "verdicts",
                "medtrain.evaluate.stage:phase_of_verdicts",
                "judge",
                lambda config: _each_shard(_protocols(config), config.judge.num_shards),
            ),
        ),
    ),
    Stage(
        name="report",
        title="write the report",
        work="medtrain.report.stage:report",
        settings=("name", "report", "seed", "data.seed", *_SHOWN),
        ignores=_SHOWN_IGNORES,
        reads=lambda run, config: [
            run.scores, run.evaluation_rows, run.data_card, *_reported(run),
        ],
        writes=lambda run, config: [run.report],
        clears=lambda run, config: [run.report],
    ),
)  # fmt: skip


def _reported(run: Run) -> list[Path]:
    present = (run.metrics("sft"), run.metrics("dpo"), run.preferences)
    return [path for path in present if path.exists()]


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages that a run of this configuration has."""
    return [stage for stage in STAGES if stage.wanted(config)]


def by_name(name: str) -> Stage:
    """The stage of that name, which must exist."""
    return next(stage for stage in STAGES if stage.name == name)


def needed_before(stage: Stage, run: Run, config: RunConfig) -> list[Stage]:
    """The stages that must be finished before one can run, in order, the indirect ones too."""
    wanted = {stage.name}
    for later in reversed(STAGES):
        if later.name in wanted:
            reads = later.reads(run, config)
            wanted |= {s.name for s in STAGES if _writes_any(s, reads, run, config)}
    return [s for s in STAGES if s.name in wanted and s.name != stage.name]


def _writes_any(stage: Stage, reads: Sequence[Path], run: Run, config: RunConfig) -> bool:
    return any(
        read == written or written in read.parents
        for written in stage.writes(run, config)
        for read in reads
    )
