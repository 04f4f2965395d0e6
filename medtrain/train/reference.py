"""The stage `reference`: what the SFT model makes of both answers of every preference pair.

preferences.jsonl + sft/adapter → token ids as DPO trains on them → shards → dpo/reference.jsonl: a
line a pair, `{"id", "chosen", "rejected", "chosen_tokens", "rejected_tokens"}`, the first two in
nats, summed over the answer's tokens; null where DPO leaves the pair out. DPO compares the trained
model with these; they do not move with its learning rate, its beta or its loss, so they are
computed once, before it, and by as many GPUs as there are shards. KTO compares the same of answers
to other prompts as well: lines of their own, whose ids medtrain.train.mismatch makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.config import RunConfig
from medtrain.config.lora_path import why_not_fused
from medtrain.console import Console
from medtrain.data.base import resolve_base
from medtrain.data.examples import read_preferences
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.digests import quick_digest
from medtrain.errors import ConfigError, DataError, MedtrainError
from medtrain.files import digest_of, read_jsonl, sha256_file, write_jsonl
from medtrain.run import Run
from medtrain.shards import Drive, Phase, Request, ShardSet, closing_sets, run_here
from medtrain.train.mismatch import Answered, is_mismatched, mismatched, mismatched_id

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer
    from medtrain.train.log_probs import AnswerScorer

BATCH_PAIRS = 32
"""Pairs of similar length that are read together; they are cut further by their tokens."""


def compute_reference(
    run: Run, config: RunConfig, console: Console, drive: Drive = run_here
) -> dict[str, Any]:
    """Write the reference's log-probabilities of all preference pairs; returns counts.

    Raises:
        DataError: there is no SFT adapter.
        AdapterMismatchError: it does not fit the base.
        ConfigError: the GPU is too small.
        MedtrainError: a pair ended its process again and again.
    """
    with phase_of_sums(run, config) as phase:
        if phase.sets:
            drive(phase, console)
        else:
            write_jsonl(run.reference, [])
    return _counts(run)


@contextmanager
def phase_of_sums(run: Run, config: RunConfig) -> Iterator[Phase]:
    """The phase of `reference`: one shard set, or none where there are no pairs."""
    chat = load_chat_tokenizer(run)
    requests = _requests(run, config, chat)
    if not requests:
        yield Phase("sums", ())
        return
    model = _Reference(run, config, chat)
    shard_set = ShardSet(
        key="sums",
        title="reference",
        directory=run.reference_shards,
        requests=requests,
        settings=_settings(run, config, chat),
        work=lambda batches: score_pairs(model.load, batches, config),
        collected=run.reference,
        batch_size=BATCH_PAIRS,
        num_shards=config.dpo.reference_shards,
        release=model.release,
    )
    with closing_sets(Phase("sums", (shard_set,))) as phase:
        yield phase


def read_reference(run: Run, config: RunConfig) -> dict[str, tuple[float, float]]:
    """The reference's log-probabilities of the chosen and the rejected answer, in nats, by pair id.

    Pairs that DPO leaves out are left out here too; empty where the method needs no reference.

    Raises:
        DataError: there is none, or not of every pair.
    """
    if not config.dpo.needs_reference:
        return {}
    again = f"medtrain run {run.config} --only reference --force reference"
    try:
        lines = {line["id"]: line for line in read_jsonl(run.reference)}
    except FileNotFoundError as error:
        raise DataError(
            f"The reference's log-probabilities are missing: there is no {run.reference}",
            fix=f"Compute them: medtrain run {run.config} --only reference",
        ) from error
    for pair in read_preferences(run.preferences):
        if "chosen" not in lines.get(pair.id, {}):
            raise DataError(
                f"{run.reference} has no log-probabilities of the pair {pair.id}",
                fix=f"The preferences were changed since: {again}",
            )
    return {
        row_id: (line["chosen"], line["rejected"])
        for row_id, line in lines.items()
        if line.get("chosen") is not None
    }


def score_pairs(
    load: Callable[[], AnswerScorer], batches: Iterable[Sequence[Request]], config: RunConfig
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the reference over batches of pairs; yields (pair id, its line).

    Raises:
        ConfigError: the GPU is too small.
    """
    import torch

    from medtrain.train.log_probs import Row

    # Before the first batch is taken: a death while loading is not the fault of its rows.
    scorer = load()
    for pairs in batches:
        rows = [
            Row.answering(pair.payload["prompt"], pair.payload[side])
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        try:
            sums = scorer.sums(rows)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The GPU has too little memory to read answers with {config.model.base}",
                fix="Ask for a larger one (cluster.stages.reference.gpu_type), lower "
                f"dpo.max_length (now {config.dpo.max_length}), or use model.quantization=nf4.",
            ) from error
        for pair, chosen, rejected in zip(pairs, sums[::2], sums[1::2], strict=True):
            counts = {f"{side}_tokens": len(pair.payload[side]) for side in ("chosen", "rejected")}
            left_out = not any(counts.values())
            nats = {"chosen": None, "rejected": None} if left_out else {
                "chosen": chosen, "rejected": rejected}  # fmt: skip
            yield pair.id, {**nats, **counts}


def _requests(run: Run, config: RunConfig, chat: ChatTokenizer) -> list[Request]:
    """A request a pair; for KTO, one more with the answers to another prompt."""
    from medtrain.train.rows import encode_pair

    requests: list[Request] = []
    usable: dict[str, Answered] = {}
    for preference in read_preferences(run.preferences):
        pair = encode_pair(preference, chat, config.dpo.max_length)
        if pair.is_usable:
            usable[preference.id] = Answered(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        requests.append(
            _request(preference.id, usable.get(preference.id, Answered(pair.prompt_ids, [], [])))
        )
    if config.dpo.method == "kto":
        others = mismatched(list(usable.values()), config.dpo.max_length)
        requests += [
            _request(mismatched_id(row_id), other)
            for row_id, other in zip(usable, others, strict=True)
        ]
    return requests


def _request(row_id: str, pair: Answered) -> Request:
    """What it costs is how much the model reads."""
    answers = len(pair.chosen_ids) + len(pair.rejected_ids)
    tokens = 2 * len(pair.prompt_ids) + answers if answers else 0
    payload = {
        "prompt": pair.prompt_ids,
        "chosen": pair.chosen_ids,
        "rejected": pair.rejected_ids,
    }
    return Request(row_id, payload, cost=tokens, prompt_tokens=tokens)


def _settings(run: Run, config: RunConfig, chat: ChatTokenizer) -> dict[str, Any]:
    """What changes results besides a pair's token ids: the model, in every respect.

    Template, `dpo.max_length` and preferences show in the token ids.
    """
    from medtrain.train.model import packs

    model, nf4 = config.model, config.model.quantization == "nf4"
    return {
        "base": _base_digest(run, config),
        "vocab_rows": [chat.base_vocab_rows, chat.vocab_rows],
        "adapter": _adapter_digest(run.adapter("sft")),
        "quantization": [model.quantization, nf4 and model.double_quantization],
        "dtype": model.dtype,
        "attention": model.attention,
        "packed": packs(run, config, "dpo"),
        "liger": config.train.liger,
        "fused_lora": why_not_fused(config, config.train.strategy) is None,
    }


def _base_digest(run: Run, config: RunConfig) -> str:
    base = resolve_base(run, config)
    if Path(base).is_dir():
        return quick_digest(Path(base))
    return digest_of({"hub": base, "revision": config.model.revision})


def _adapter_digest(adapter: Path) -> str:
    from medtrain.train.adapter import CONFIG_FILE, WEIGHTS_FILE

    try:
        return digest_of([sha256_file(adapter / name) for name in (WEIGHTS_FILE, CONFIG_FILE)])
    except FileNotFoundError as error:
        raise DataError(
            f"{adapter} holds no adapter: there is no {Path(error.filename).name} in it",
            fix="Train one: medtrain run CONFIG --until sft.",
        ) from error


class _Reference:
    """The model as DPO starts with it, loaded when it is first needed."""

    def __init__(self, run: Run, config: RunConfig, chat: ChatTokenizer) -> None:
        self._run, self._config, self._chat = run, config, chat
        self._scorer: AnswerScorer | None = None

    def load(self) -> AnswerScorer:
        from medtrain.train.adapter import attach_adapter
        from medtrain.train.computing import tell_attention
        from medtrain.train.fused_lora import fuse_where_it_fits, tell_lora
        from medtrain.train.liger import put_liger_on, uses_liger
        from medtrain.train.log_probs import AnswerScorer
        from medtrain.train.model import compute_dtype, load_base, packs

        if self._scorer is None:
            run, config = self._run, self._config
            nf4, packed = config.model.quantization == "nf4", packs(run, config, "dpo")
            base = load_base(run, config, self._chat, quantized=nf4, packed=packed)
            adapted = attach_adapter(base, run.adapter("sft"))
            if uses_liger(config):
                put_liger_on(adapted.get_base_model())
            log = Console(run.log, quiet=True)
            tell_attention(base, "reference", log, packed=packed)
            tell_lora(fuse_where_it_fits(adapted, config, config.train.strategy), "reference", log)
            self._scorer = AnswerScorer(adapted, compute_dtype(config), packed=packed)
        return self._scorer

    def release(self) -> None:
        """Give its memory back: training starts in this process, or one beside it."""
        if self._scorer is None:
            return
        import gc

        import torch

        self._scorer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _counts(run: Run) -> dict[str, Any]:
    lines = list(read_jsonl(run.reference))
    failed = [line["id"] for line in lines if "error" in line]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise MedtrainError(
            f"The pair {failed[0]}{more} ended its process again and again, most likely for want "
            "of memory",
            fix="Give the jobs more (cluster.stages.reference.mem_gb), or lower dpo.max_length; "
            f"then: medtrain run {run.config} --only reference --force reference",
        )
    lines = [line for line in lines if not is_mismatched(line["id"])]
    scored = [line for line in lines if line["chosen"] is not None]
    return {
        "pairs": len(lines),
        "answer_tokens": sum(line["chosen_tokens"] + line["rejected_tokens"] for line in scored),
        "left_out": len(lines) - len(scored),
        "chosen_likelier": sum(line["chosen"] > line["rejected"] for line in scored),
    }
