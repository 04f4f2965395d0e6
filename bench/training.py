"""SFT and DPO of a random model, by plain TRL and by medtrain: the sides that bench/gpu.py times.

`Setting` → rows of random tokens, as many as its steps take → a model built anew for every side →
`Measured`: real tokens a second, MFU, the most that was allocated, and medtrain's estimate of it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from medtrain.console import Console

if TYPE_CHECKING:
    from turns import Side

    from medtrain.run import Trained
    from medtrain.train.rows import Part


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    shape: dict[str, Any]
    """Of a Llama (bench/random_llama.py)."""
    batch: int = 2
    accumulated: int = 2
    steps: int = 12
    """Timed; one before them warms up."""
    max_length: int = 1024
    """What the baseline pads a row to."""
    checkpointing: bool = False
    quantized: bool = True
    section: dict[str, Any] = field(default_factory=dict)
    """More settings of the stage, for our side and the baseline."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of `train:`."""
    new_tokens: tuple[int, ...] = ()
    """Whose rows are trained too, as those of a chat format that the base lacks."""

    @property
    def rows_a_step(self) -> int:
        """Of one optimiser step."""
        return self.batch * self.accumulated


class Measured(NamedTuple):
    """One side."""

    side: Side
    tokens_per_s: float
    step_s: float
    mfu: float | None
    """None on a CPU, and where the GPU's peak is not known."""
    expected_bytes: float
    """medtrain's estimate of what is allocated at most, for the largest pass that there was."""

    @property
    def memory_error(self) -> float | None:
        """How far the estimate is off, as a share of the measured peak; None on a CPU."""
        peak = self.side.peak_bytes
        return self.expected_bytes / peak - 1 if peak else None

    def __str__(self) -> str:
        said = f"{self.tokens_per_s:,.0f} tokens/s, {self.step_s * 1e3:,.0f} ms a step"
        if self.mfu is not None:
            said += f", MFU {self.mfu:.1%}"
        if self.side.peak_bytes is not None:
            said += f", peak {self.side.peak_bytes / 2**30:.2f} GiB"
        return said


class Training:
    """Rows, settings, and the model, which is built anew for every side."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        import torch
        from random_rows import dpo_part, sft_part, word_tokenizer
        from transformers import LlamaConfig

        from medtrain.config import parse_config
        from medtrain.memory.architecture import from_config
        from medtrain.run import Run
        from medtrain.train.model import compute_dtype

        self._setting, self._shape = setting, LlamaConfig(**setting.shape)
        self._architecture = from_config(self._shape.to_dict())
        self.config = parse_config(_tree(directory, setting))
        self._run = Run(directory / "bench")
        self._run.create()
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._dtype = compute_dtype(self.config)
        self._tokenizer = word_tokenizer()
        self._longest = 0
        rows = setting.rows_a_step * (setting.steps + 1)
        self._parts = {"sft": sft_part(rows, self._shape.vocab_size),
                       "dpo": dpo_part(rows, self._shape.vocab_size)}  # fmt: skip

    def plain(self, stage: Trained) -> Measured:
        """The baseline: TRL alone, every row padded."""
        from plain_trl import train_plainly

        self.forget()
        model = self._model(packed=False, drawn=stage == "dpo")
        side = train_plainly(stage, model, self._parts[stage], self._tokenizer, self._run,
                             self.config, self._plan(stage))  # fmt: skip
        return self._measured(stage, side._replace(peak_bytes=self._peak()))

    def medtrain(self, stage: Trained) -> Measured:
        """Ours; DPO's time includes computing its reference."""
        from plain_trl import order_and_tokens
        from turns import our_clocks

        part, plan = self._parts[stage], self._plan(stage)
        _, tokens = order_and_tokens(part, getattr(self.config, stage), plan, self.config.seed)
        with our_clocks() as clocks:
            reference = sums = None
            if stage == "dpo":
                self.forget()
                sums = self._reference_sums(part)
                assert clocks.reference is not None
                reference = clocks.reference.read()
            self.forget()
            self._train(stage, sums)
            self._longest = clocks.longest
            side = clocks.side(tokens, reference)._replace(peak_bytes=self._peak())
        return self._measured(stage, side)

    def _train(self, stage: Trained, sums: dict[str, tuple[float, float]] | None) -> None:
        from random_rows import PAD

        from medtrain.train.feeding import feed_preferences, feed_supervised, pair_collate
        from medtrain.train.fit import Fit
        from medtrain.train.rows import Counts, Rows
        from medtrain.train.trainer_settings import PAIRED, SUPERVISED, trainer_settings
        from medtrain.train.trainers import PreferenceTrainer, SupervisedTrainer

        config, part, plan = self.config, self._parts[stage], self._plan(stage)
        section, console = getattr(config, stage), Console(quiet=True)
        unsaved = section.model_copy(update={"trainer": {**section.trainer, "save_strategy": "no"}})
        settings = trainer_settings(
            SUPERVISED if stage == "sft" else PAIRED, self._run,
            config.model_copy(update={stage: unsaved}), stage, plan,
            validated=False, console=console,
        )  # fmt: skip
        make = SupervisedTrainer if stage == "sft" else PreferenceTrainer
        trainer = make(
            model=self._model(packed=True, drawn=stage == "dpo"), plan=plan, args=settings,
            train_dataset=part.dataset, processing_class=self._tokenizer,
        )  # fmt: skip
        rows, seed = Rows(part, None, Counts()), config.seed
        if stage == "sft":
            fed = feed_supervised(rows, section, plan, seed=seed, pad_token_id=PAD, packed=True)
        else:
            collate = pair_collate(PAD, packed=True)
            fed = feed_preferences(rows, section, plan, sums, seed=seed, collate=collate,
                                   packed=True)  # fmt: skip
        chat: Any = SimpleNamespace()  # publishing an adapter would ask it
        Fit(self._run, config, stage, chat, plan, console).feed(trainer, fed)
        trainer.train()

    def _reference_sums(self, part: Part) -> dict[str, tuple[float, float]]:
        from medtrain.shards import Request
        from medtrain.train import log_probs
        from medtrain.train.reference import BATCH_PAIRS, score_pairs

        pairs = [
            Request(row_id, {"prompt": row["prompt_ids"], "chosen": row["chosen_ids"],
                             "rejected": row["rejected_ids"]}, cost=length, prompt_tokens=length)
            for row_id, row, length in zip(part.ids, part.dataset, part.lengths, strict=True)
        ]  # fmt: skip
        model = self._model(packed=True, drawn=True).eval()
        scorer = log_probs.AnswerScorer(model, self._dtype, packed=True)
        batches = (pairs[i : i + BATCH_PAIRS] for i in range(0, len(pairs), BATCH_PAIRS))
        scored = score_pairs(lambda: scorer, batches, self.config)
        return {row_id: (line["chosen"], line["rejected"]) for row_id, line in scored}

    def _plan(self, stage: Trained) -> Any:
        from medtrain.train.trainer_settings import make_plan

        return make_plan(getattr(self.config, stage), len(self._parts[stage]), "ddp")

    def _model(self, *, packed: bool, drawn: bool) -> Any:
        """The base with its adapter; `drawn` as if it had been trained."""
        import torch
        from random_llama import random_llama

        from medtrain.attention.packed import attention_for
        from medtrain.train.adapter import add_adapter, trainable_parameters
        from medtrain.train.fused_lora import fuse_where_it_fits

        # Each side as it comes: medtrain leaves cuDNN's attention out where it loads a model.
        torch.backends.cuda.enable_cudnn_sdp(not packed)
        attention = attention_for(self.config.model.attention, packed=packed)
        base = random_llama(self._shape, dtype=self._dtype, device=self._device,
                            attention=attention, quantized=self._setting.quantized)  # fmt: skip
        chat: Any = SimpleNamespace(new_token_ids=self._setting.new_tokens)
        model = add_adapter(base, self.config.sft.lora, chat, seed=0)
        for name, parameter in trainable_parameters(model):
            if drawn and "lora_B" in name:
                parameter.data += 0.005 * torch.randn_like(parameter)
        if packed:  # as our side has it
            fuse_where_it_fits(model, self.config, "ddp")
        return model

    def forget(self) -> None:
        """Free what the side before has left, and count from here on."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def _measured(self, stage: Trained, side: Side) -> Measured:
        rate = side.tokens / side.spent.wall
        return Measured(side, rate, side.spent.wall / self._setting.steps, self._mfu(rate),
                        self._expected_bytes(stage))  # fmt: skip

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Of a frozen weight: 2 FLOPs a token forward, and 2 backward."""
        import torch
        from trl.trainer.utils import get_peak_flops

        if not torch.cuda.is_available():
            return None
        sizes = self._architecture
        assert sizes is not None
        peak = get_peak_flops(torch.cuda.get_device_name(), str(self._dtype).split(".")[-1])
        weights = sizes.linear_weights + sizes.vocab * sizes.hidden
        return 4.0 * weights * tokens_per_s / peak if peak else None

    def _expected_bytes(self, stage: Trained) -> float:
        import torch

        from medtrain.memory import estimate, work_of

        assert self._architecture is not None
        section, on_gpu = getattr(self.config, stage), self._device.type == "cuda"
        older = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
        work = work_of(self.config, stage, self._architecture, auto_bytes=4 if older else 2,
                       device="cuda" if on_gpu else "cpu")  # fmt: skip
        if self._longest:
            work = replace(work, tokens=self._longest)
        return estimate(
            self._architecture, work, checkpointing=section.activation_checkpointing
        ).allocated


def _tree(directory: Path, setting: Setting) -> dict[str, Any]:
    shared = {
        "batch_size": setting.batch, "gradient_accumulation": setting.accumulated,
        "max_length": setting.max_length, "validation_fraction": 0,
        "log_every": max(1, setting.steps // 3),
        "activation_checkpointing": setting.checkpointing, **setting.section,
    }  # fmt: skip
    return {
        "name": "bench", "output_dir": str(directory),
        "model": {"base": str(directory / "none"), "chat_template": "model",
                  "quantization": "nf4" if setting.quantized else "none"},
        "data": {"sources": [{"adapter": "table", "path": "none.jsonl"}]},
        "sft": shared, "dpo": {k: v for k, v in shared.items() if k != "lora"},
        "train": setting.train,
    }  # fmt: skip
