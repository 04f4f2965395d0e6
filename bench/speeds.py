"""The parts `sft`, `dpo` and `memory` of bench/gpu.py: plain TRL beside medtrain.

For each shape and size of a step: ours, then the baseline, each with a model of its own → real
tokens a second, MFU, peak → the ratio, and how far the estimate of memory is off.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from random_llama import LLAMA_3_1B, LLAMA_3_8B, MIDDLE, TINY
from record import Record
from training import Measured, Setting, Training

if TYPE_CHECKING:
    from medtrain.run import Trained

SHAPES = {"8b": LLAMA_3_8B, "1b": LLAMA_3_1B, "middle": MIDDLE}
SECONDS = {"8b": 14.0, "1b": 9.0, "middle": 6.0}
"""What a side takes at least, its model included."""


def sft(record: Record) -> None:
    """Steps of 4 rows and of 32, of an 8B, and of 32 of a 1B."""
    _both(record, "sft", "8b", Setting(LLAMA_3_8B))
    _both(record, "sft", "8b", Setting(LLAMA_3_8B, batch=4, accumulated=8, steps=5))
    _both(record, "sft", "1b", Setting(LLAMA_3_1B, batch=4, accumulated=8, steps=5))
    unfused = Setting(LLAMA_3_8B, batch=4, accumulated=8, steps=5, train={"fused_lora": False})
    _ours(record, "sft", "8b", unfused, ", adapters by PEFT")
    without = Setting(LLAMA_3_8B, batch=4, accumulated=8, steps=5, quantized=False)
    _ours(record, "sft", "8b", without, ", 16-bit base")


def dpo(record: Record) -> None:
    """Steps of 4 pairs, of an 8B and of a 1B."""
    _both(record, "dpo", "8b", Setting(LLAMA_3_8B, steps=8))
    _both(record, "dpo", "1b", Setting(LLAMA_3_1B, steps=8))


def memory(record: Record) -> None:
    """The estimate beside the measured peak, where an activation counts and where a weight does."""
    stages: tuple[Trained, ...] = ("sft", "dpo")
    for stage in stages:
        for name in ("middle",) if record.tiny else ("middle", "1b"):
            whole = Setting(SHAPES[name], steps=3)
            variants = (
                ("", whole),
                (", checkpointing", replace(whole, checkpointing=True)),
                (", 16-bit base", replace(whole, quantized=False)),
            )
            for said, setting in variants:
                _ours(record, stage, name, setting, said)


def _both(record: Record, stage: Trained, name: str, setting: Setting) -> None:
    ours = _ours(record, stage, name, setting)
    setting = _sized(record, setting)
    title = f"{stage} {name} {setting.batch} × {setting.accumulated}"

    def baseline() -> None:
        plain = _train("plain", stage, setting)
        ratio = ours.tokens_per_s / plain.tokens_per_s if ours else None
        told = f"; medtrain is {ratio:.2f} times as fast" if ratio else ""
        loss = f"; loss {plain.side.loss:.4f}"
        if ours:
            loss += f", medtrain's {ours.side.loss:.4f}"
        record.figure(f"{title} plain TRL", f"{plain}{told}{loss}", ratio=ratio,
                      tokens_per_s=plain.tokens_per_s, mfu=plain.mfu,
                      forwards_a_step=plain.side.forwards)  # fmt: skip

    record.attempt(f"{title} plain TRL", baseline, seconds=1.5 * SECONDS[name])


def _ours(
    record: Record, stage: Trained, name: str, setting: Setting, said: str = ""
) -> Measured | None:
    setting = _sized(record, setting)
    title = f"{stage} {name} {setting.batch} × {setting.accumulated} medtrain{said}"

    def measure() -> Measured:
        ours = _train("medtrain", stage, setting)
        expected = f"; estimated peak {ours.expected_bytes / 2**30:.2f} GiB"
        if ours.memory_error is not None:
            expected += f" ({ours.memory_error:+.1%})"
        record.figure(
            title, f"{ours}{expected}", tokens_per_s=ours.tokens_per_s, mfu=ours.mfu,
            step_s=ours.step_s, peak_bytes=ours.side.peak_bytes, loss=ours.side.loss,
            memory_error=ours.memory_error, forwards_a_step=ours.side.forwards,
        )  # fmt: skip
        return ours

    return record.attempt(title, measure, seconds=SECONDS[name])


def _sized(record: Record, setting: Setting) -> Setting:
    if not record.tiny:
        return setting
    return replace(setting, shape=TINY, steps=2, batch=2, accumulated=2, max_length=512)


def _train(side: str, stage: Trained, setting: Setting) -> Measured:
    with tempfile.TemporaryDirectory() as directory:
        training = Training(Path(directory), setting)
        measured = training.plain(stage) if side == "plain" else training.medtrain(stage)
        training.forget()
    return measured
