"""What a GPU does with medtrain, part by part, each beside a baseline of the same call.

    python bench/gpu.py [--budget 600] [PART…]

    facts      versions, the card, its bandwidth and arithmetic, doctor
    attention  the kernels of packed rows, beside row by row
    sft        an 8B in NF4 at 2 × 2 and 4 × 8 rows a step, and a 1B, beside plain TRL with padding
    dpo        the same at 2 × 2 pairs, the reference included
    decoding   an 8B and a 1B in 16 bits, 8 × 2 and 32 × 2 answers, beside model.generate
    profile    GPU time by kind of kernel, how busy the GPU is, launches a step
    waits      where the host waits for the GPU in a step
    memory     the estimate of a training's peak, beside the measured one

Needs one CUDA GPU of 60 GB or more (of 24 GB for what is about a 1B) and bitsandbytes; no download:
weights are random, and rows are random tokens as long as MedQuAD's. A part is a process of its own
with a time limit; it writes its file (--out) anew after every figure, so whatever was measured
before a limit counts. MFU takes 2 FLOPs a frozen weight and token forward, and 2 backward. `--tiny`
runs everything on a CPU in a minute or two, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medtrain.console import quiet_libraries
from medtrain.kernel_cache import keep_compiled_kernels

if TYPE_CHECKING:
    from record import Record

NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
LIMITS = {"facts": 60, "sft": 200, "dpo": 100, "decoding": 130, "attention": 50, "profile": 70,
          "waits": 50, "memory": 110}  # fmt: skip
"""Seconds that a part may take, by value: what comes first is not cut by what comes after."""
HOMES = {"facts": "card", "sft": "speeds", "dpo": "speeds", "memory": "speeds",
         "decoding": "decoding", "attention": "kernels", "profile": "steps",
         "waits": "steps"}  # fmt: skip
"""The module of each."""
LEAST = 10.0
"""Seconds in which no part says anything."""
_TINY_LIMIT = 240
_SETTLE = 5.0
"""Seconds of a budget that are kept for the table."""


class Ended(NamedTuple):
    """A part."""

    name: str
    state: str
    """`ok`, or what was wrong."""
    seconds: float
    found: dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"bench/gpu.py cannot run: {', '.join(missing)} not installed")
    quiet_libraries()
    keep_compiled_kernels()
    if arguments.alone:
        do_part(arguments)
        return
    out = arguments.out or Path(tempfile.mkdtemp(prefix="medtrain-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    _check_card(arguments.tiny)
    until = time.monotonic() + arguments.budget
    ended = []
    for name in arguments.parts or LIMITS:
        limit = min(_TINY_LIMIT if arguments.tiny else LIMITS[name],
                    until - time.monotonic() - _SETTLE)  # fmt: skip
        if limit < LEAST:
            ended.append(Ended(name, "no time left", 0.0, {}))
            continue
        print(f"{name} (at most {limit:.0f} s)", flush=True)
        ended.append(run_part(name, limit, out, tiny=arguments.tiny))
    tell(ended, out)
    sys.exit(any(part.state != "ok" for part in ended))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(LIMITS))
    parser.add_argument("--budget", type=float, default=600, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="directory of the files, PART.json each")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; runs on a CPU")
    parser.add_argument("--alone", metavar="SECONDS", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in LIMITS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    return arguments


def do_part(arguments: argparse.Namespace) -> None:
    """Be the process of a part."""
    import torch
    from record import Record

    if arguments.tiny:
        torch.set_num_threads(1)
    (name,) = arguments.parts
    record = Record(arguments.out / f"{name}.json", arguments.alone, tiny=arguments.tiny)
    part_named(name)(record)


def part_named(name: str) -> Callable[[Record], None]:
    """The function of a part; nothing of the others is imported."""
    part: Callable[[Record], None] = getattr(importlib.import_module(HOMES[name]), name)
    return part


def run_part(name: str, limit: float, out: Path, *, tiny: bool) -> Ended:
    """Run a part to its end, or to its limit."""
    file = out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--alone", str(limit), "--out", str(out)]
    began = time.monotonic()
    child = subprocess.Popen([*command, *(["--tiny"] if tiny else [])], start_new_session=True)
    try:
        code = child.wait(limit)
        state = "ok" if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        state = f"stopped at its limit of {limit:.0f} s"
    finally:
        # Whatever it has started, and it itself where it has not ended.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    found: dict[str, Any] = {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state += ", nothing written"
    if state == "ok" and found.get("failed"):
        state = "failed in part"
    return Ended(name, state, time.monotonic() - began, found)


def tell(ended: list[Ended], out: Path) -> None:
    """Print everything that was found."""
    from card import card_name, versions

    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"\n{card_name()}; {told}")
    for part in ended:
        print(f"\n{part.name}: {part.state}, {part.seconds:.0f} s")
        for name, said in part.found.get("figures", {}).items():
            print(f"  {name:<44} {said}")
        for name, why in part.found.get("failed", {}).items():
            print(f"  {name:<44} FAILED: {why}")
        if left_out := part.found.get("left_out"):
            print(f"  left out for want of time: {', '.join(left_out)}")
    print(f"\nFiles: {out}", flush=True)


def _check_card(tiny: bool) -> None:
    import torch

    if not (tiny or torch.cuda.is_available()):
        sys.exit("bench/gpu.py cannot run: there is no CUDA GPU (--tiny needs none)")


if __name__ == "__main__":
    main()
