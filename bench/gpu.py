"""bench/train.py on one GPU: SFT and DPO of a Llama-3-8B-shaped model, beside plain TRL.

    python bench/gpu.py [--stage both] [--steps 12] [--repeat 2] [--checkpointing]

Needs one CUDA GPU of 40 GB or more (24 GB with --checkpointing) and bitsandbytes; no download: the
model's weights are random, and rows are random tokens as long as MedQuAD's. Prints real tokens a
second, MFU (of a frozen weight: 2 FLOPs a token forward, 2 backward), the most that was allocated,
and how far medtrain's estimate of that is off. `--tiny` runs the same on a CPU in half a minute; it
measures nothing that matters.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from medtrain.console import Console, quiet_libraries

if TYPE_CHECKING:
    from turns import Side

    from medtrain.run import Trained
    from medtrain.train.rows import Part

NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
BATCH, ACCUMULATED, MAX_LENGTH = 2, 2, 1024
ROWS_A_STEP = BATCH * ACCUMULATED


def main() -> None:
    arguments = parse_arguments()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"bench/gpu.py cannot run: {', '.join(missing)} not installed")
    quiet_libraries()
    import torch
    from turns import take_turns, tell

    if not (arguments.tiny or torch.cuda.is_available()):
        sys.exit("bench/gpu.py cannot run: there is no CUDA GPU (--tiny needs none)")
    if arguments.tiny:
        torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if on_gpu else "CPU", flush=True)
    stages: tuple[Trained, ...] = (
        ("sft", "dpo") if arguments.stage == "both" else (arguments.stage,)
    )
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), arguments)
        for stage in stages:
            sides = partial(bench.plain, stage), partial(bench.medtrain, stage)
            turns = take_turns(*sides, arguments.repeat)
            tell(f"{stage}: {arguments.steps} steps of {ROWS_A_STEP} rows, "
                 f"{turns[0][0].tokens:,} tokens, padded to {MAX_LENGTH}; {arguments.repeat} turns",
                 turns, cpu=not on_gpu)  # fmt: skip
            for name, side in zip(("plain TRL", "medtrain"), turns[-1], strict=True):
                print(f"  {name:<10}{bench.hardware(side)}")
            print(f"  {bench.estimated(stage, turns[-1][1])}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", choices=("sft", "dpo", "both"), default="both")
    parser.add_argument("--steps", type=int, default=12, help=f"timed, of {ROWS_A_STEP} rows each")
    parser.add_argument("--repeat", type=int, default=2, help="turns of each side")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, both sides")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers; runs on a CPU")
    return parser.parse_args()


class Bench:
    """Rows, settings, and the model, which is built anew for every turn of either side."""

    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        import torch
        from random_llama import LLAMA_3_8B, TINY
        from random_rows import dpo_part, sft_part, word_tokenizer
        from transformers import LlamaConfig

        from medtrain.config import parse_config
        from medtrain.memory.architecture import from_config
        from medtrain.run import Run
        from medtrain.train.model import compute_dtype

        self._shape = LlamaConfig(**(TINY if arguments.tiny else LLAMA_3_8B))
        self._architecture = from_config(self._shape.to_dict())
        shared = {
            "batch_size": BATCH, "gradient_accumulation": ACCUMULATED, "max_length": MAX_LENGTH,
            "validation_fraction": 0, "log_every": max(1, arguments.steps // 3),
            "activation_checkpointing": arguments.checkpointing,
        }  # fmt: skip
        self.config = parse_config({
            "name": "bench", "output_dir": str(directory),
            "model": {"base": str(directory / "none"), "chat_template": "model"},
            "data": {"sources": [{"adapter": "table", "path": "none.jsonl"}]},
            "sft": shared, "dpo": shared,
        })  # fmt: skip
        self._run = Run(directory / "bench")
        self._run.create()
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._dtype = compute_dtype(self.config)
        self._tokenizer = word_tokenizer()
        self._longest = 0
        rows = ROWS_A_STEP * (arguments.steps + 1)
        self._parts = {"sft": sft_part(rows, self._shape.vocab_size),
                       "dpo": dpo_part(rows, self._shape.vocab_size)}  # fmt: skip

    def plain(self, stage: Trained, turn: int) -> Side:
        """One turn of the baseline."""
        from plain_trl import train_plainly

        self._forget()
        model = self._model(packed=False, drawn=stage == "dpo")
        side = train_plainly(stage, model, self._parts[stage], self._tokenizer, self._run,
                             self.config, self._plan(stage))  # fmt: skip
        return side._replace(peak_bytes=self._peak())

    def medtrain(self, stage: Trained, turn: int) -> Side:
        """One turn of ours."""
        from plain_trl import order_and_tokens
        from turns import our_clocks

        part, plan = self._parts[stage], self._plan(stage)
        _, tokens = order_and_tokens(part, getattr(self.config, stage), plan, self.config.seed)
        with our_clocks() as clocks:
            reference = sums = None
            if stage == "dpo":
                self._forget()
                sums = self._reference_sums(part)
                assert clocks.reference is not None
                reference = clocks.reference.read()
            self._forget()
            self._train(stage, sums)
            self._longest = clocks.longest
            return clocks.side(tokens, reference)._replace(peak_bytes=self._peak())

    def _train(self, stage: Trained, sums: dict[str, tuple[float, float]] | None) -> None:
        from random_rows import PAD

        from medtrain.train.feeding import feed_preferences, feed_supervised, pair_collate
        from medtrain.train.fit import Fit
        from medtrain.train.rows import Counts, Rows
        from medtrain.train.trainer_settings import PAIRED, SUPERVISED, trainer_settings
        from medtrain.train.trainers import PreferenceTrainer, SupervisedTrainer

        config, part, plan, console = self.config, self._parts[stage], self._plan(stage), Console(
            quiet=True)  # fmt: skip
        section = getattr(config, stage)
        unsaved = section.model_copy(update={"trainer": {"save_strategy": "no"}})
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

        from medtrain.train.adapter import add_adapter, trainable_parameters
        from medtrain.train.packed import attention_for

        attention = attention_for(self.config.model.attention, packed=packed)
        base = random_llama(self._shape, dtype=self._dtype, device=self._device,
                            attention=attention)  # fmt: skip
        chat: Any = SimpleNamespace(new_token_ids=())
        model = add_adapter(base, self.config.sft.lora, chat, seed=0)
        for name, parameter in trainable_parameters(model):
            if drawn and "lora_B" in name:
                parameter.data += 0.005 * torch.randn_like(parameter)
        return model

    def _forget(self) -> None:
        """Free what the turn before has left, and count from here on."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def hardware(self, side: Side) -> str:
        """MFU and memory of a side."""
        if side.peak_bytes is None:
            return "MFU and memory: not measured on a CPU"
        import torch
        from trl.trainer.utils import get_peak_flops

        sizes = self._architecture
        assert sizes is not None
        flops = get_peak_flops(torch.cuda.get_device_name(), str(self._dtype).split(".")[-1])
        weights = sizes.linear_weights + sizes.vocab * sizes.hidden
        done = 4.0 * weights * side.tokens / side.spent.wall
        mfu = f"{done / flops:.1%}" if flops else "unknown (this GPU's peak is not known)"
        return f"MFU {mfu}, {done / 1e12:,.1f} TFLOP/s, peak {side.peak_bytes / 2**30:.2f} GiB"

    def estimated(self, stage: Trained, ours: Side) -> str:
        """medtrain's estimate of its own peak, for the largest forward pass that there was."""
        import torch

        from medtrain.memory import estimate, work_of

        assert self._architecture is not None
        section = getattr(self.config, stage)
        on_gpu = self._device.type == "cuda"
        older = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
        work = work_of(self.config, stage, self._architecture, auto_bytes=4 if older else 2,
                       device="cuda" if on_gpu else "cpu")  # fmt: skip
        work = replace(work, tokens=self._longest)
        expected = estimate(
            self._architecture, work, checkpointing=section.activation_checkpointing
        ).allocated
        told = f"estimated peak of medtrain {expected / 2**30:.2f} GiB for {self._longest:,} tokens"
        if ours.peak_bytes is None:
            return told
        return f"{told}, {expected / ours.peak_bytes - 1:+.1%} against the measured one"


if __name__ == "__main__":
    main()
