"""Real tokens a second of medtrain's SFT and DPO, beside plain TRL with padded rows, in one run.

    OMP_NUM_THREADS=1 python bench/train.py MODEL_DIR MEDQUAD.jsonl.xz [--stage both] [--steps 24]

Needs a base model of a few million parameters, a file of MedQuAD's rows (as the source `medquad`
reads it), and a quarter of an hour on a CPU. Both sides train the same adapter on the same 4-bit
base, with the same optimiser and the same rows in every step, in batches of 2 accumulated twice;
the baseline (bench/plain_trl.py) pads each row to `max_length`. DPO prefers a question's own answer
to another question's; medtrain's time includes its computing of the reference, which the baseline
does in every step. Neither padding nor the first step counts. The two take turns, and medians
count; processor seconds are for machines that others use too.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.console import quiet_libraries

if TYPE_CHECKING:
    from turns import Side

    from medtrain.run import Run, Trained

BATCH, ACCUMULATED = 2, 2
ROWS_A_STEP = BATCH * ACCUMULATED
SPARE = 1.5
"""Rows read for every row trained on: some are evaluated, some are duplicates."""


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    import torch
    from turns import take_turns, tell

    torch.set_num_threads(arguments.threads)
    stages: tuple[Trained, ...] = (
        ("sft", "dpo") if arguments.stage == "both" else (arguments.stage,)
    )
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), arguments)
        for stage in stages:
            sides = partial(bench.plain, stage), partial(bench.medtrain, stage)
            turns = take_turns(*sides, arguments.repeat)
            padded = arguments.sft_length if stage == "sft" else arguments.dpo_length
            tell(f"{stage}: {arguments.steps} steps of {ROWS_A_STEP} rows, "
                 f"{turns[0][0].tokens:,} tokens, padded to {padded}; {arguments.repeat} turns, "
                 f"threads: {arguments.threads}", turns, cpu=True)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("data", type=Path, help="MedQuAD's rows as JSON lines, compressed or not")
    parser.add_argument("--stage", choices=("sft", "dpo", "both"), default="both")
    parser.add_argument("--steps", type=int, default=24, help=f"timed, of {ROWS_A_STEP} rows each")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each side")
    parser.add_argument("--sft-length", type=int, default=1000, help="tokens of a padded row")
    parser.add_argument("--dpo-length", type=int, default=1024, help="tokens of a padded answer")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Bench:
    """A prepared run, and copies of it in which each side trains."""

    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        from medtrain.config import parse_config
        from medtrain.console import Console
        from medtrain.data.prepare import prepare
        from medtrain.data.tokenizer import load_chat_tokenizer
        from medtrain.run import Run

        rows = ROWS_A_STEP * (arguments.steps + 1)
        shared = {
            "batch_size": BATCH, "gradient_accumulation": ACCUMULATED, "validation_fraction": 0,
            "log_every": max(1, arguments.steps // 3),
        }  # fmt: skip
        self.config = parse_config({
            "name": "prepared",
            "output_dir": str(directory),
            "model": {"base": str(arguments.model.resolve())},
            "data": {
                "max_rows": int(rows * SPARE) + 20, "eval_fraction": 0.1,
                "sources": [{"adapter": "medquad", "path": str(arguments.data.resolve())}],
            },
            "sft": {**shared, "max_length": arguments.sft_length},
            "dpo": {**shared, "max_length": arguments.dpo_length},
        })  # fmt: skip
        self._directory, self._console = directory, Console(quiet=True)
        self._prepared = Run(directory / "prepared")
        self._prepared.create()
        prepare(self._prepared, self.config, self._console)
        self._chat = load_chat_tokenizer(self._prepared)
        choose_rows(self._prepared, rows)
        self._draw_adapter()

    def plain(self, stage: Trained, turn: int) -> Side:
        """One turn of the baseline."""
        from plain_trl import train_plainly

        from medtrain.train.adapter import add_adapter, attach_adapter
        from medtrain.train.model import load_base

        run, config, chat = self._copy(f"plain-{stage}-{turn}"), self.config, self._chat
        base = load_base(run, config, chat, quantized=True)
        if stage == "sft":
            model = add_adapter(base, config.sft.lora, chat, seed=config.seed)
        else:
            model = attach_adapter(base, run.adapter("sft"), trainable=True)
        part, plan = self._rows_and_plan(stage, run)
        return train_plainly(stage, model, part, chat.tokenizer, run, config, plan)

    def medtrain(self, stage: Trained, turn: int) -> Side:
        """One turn of ours, by the stages as `medtrain run` calls them."""
        from plain_trl import order_and_tokens
        from turns import our_clocks

        from medtrain.train.dpo import train_dpo
        from medtrain.train.reference import compute_reference
        from medtrain.train.sft import train_sft

        run, config = self._copy(f"medtrain-{stage}-{turn}"), self.config
        part, plan = self._rows_and_plan(stage, run)
        _, tokens = order_and_tokens(part, getattr(config, stage), plan, config.seed)
        with our_clocks() as clocks:
            if stage == "sft":
                train_sft(run, config, self._console)
                return clocks.side(tokens)
            compute_reference(run, config, self._console)
            assert clocks.reference is not None, "the reference was not computed here"
            reference = clocks.reference.read()
            train_dpo(run, config, self._console)
            return clocks.side(tokens, reference)

    def _rows_and_plan(self, stage: Trained, run: Run) -> tuple[Any, Any]:
        from medtrain.train.rows import dpo_rows, sft_rows
        from medtrain.train.trainer_settings import make_plan

        rows = (sft_rows if stage == "sft" else dpo_rows)(run, self.config, self._chat)
        return rows.train, make_plan(getattr(self.config, stage), len(rows.train), "ddp")

    def _draw_adapter(self) -> None:
        """What DPO starts from: trained a little, as it were."""
        import torch

        from medtrain.train.adapter import add_adapter, trainable_parameters, write_adapter
        from medtrain.train.model import load_base

        base = load_base(self._prepared, self.config, self._chat, quantized=False)
        model = add_adapter(base, self.config.sft.lora, self._chat, seed=0)
        for name, parameter in trainable_parameters(model):
            if "lora_B" in name:
                parameter.data += 0.005 * torch.randn_like(parameter)
        write_adapter(model, self._prepared.adapter("sft"))

    def _copy(self, name: str) -> Run:
        from medtrain.run import Run

        shutil.copytree(self._prepared.root, self._directory / name)
        return Run(self._directory / name)


def choose_rows(run: Run, count: int) -> None:
    """Leave as many training rows as the steps take, and make a pair of each."""
    from medtrain.files import read_jsonl, write_jsonl

    rows = list(read_jsonl(run.train_rows))[:count]
    if len(rows) < count:
        raise SystemExit(f"the data has {len(rows)} rows to train on, and --steps needs {count}")
    write_jsonl(run.train_rows, rows)
    write_jsonl(run.preferences, [
        {"id": f"{row['id']}:0-1", "source": "bench", "prompt": row["messages"][:-1],
         "chosen": row["messages"][-1]["content"], "rejected": other["messages"][-1]["content"]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ])  # fmt: skip


if __name__ == "__main__":
    main()
