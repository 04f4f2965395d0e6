"""Commands as a user types them, each in a process of its own and in its own copy of one run.

prepare once, without a GPU → a copy of the run directory for every command → `medtrain run` in the
background → a future of `Done`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from medtrain.run import Run
from tests.gpu.size import Size
from tests.small_run import write_config
from tests.tiny import tiny_base

_ROOT = Path(__file__).parents[2]
_SFT_ALONE = ("--until", "sft")
_EXACT = ("sft.lora.dropout=0", "sft.log_every=1", "sft.evals_per_epoch=0",
          "sft.optimizer=adamw_torch_fused")  # fmt: skip
_LIMIT_S = 280


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    seconds: float
    run: Run
    said: str
    """The end of what it printed."""

    def lines(self, stage: str = "sft") -> list[dict[str, Any]]:
        return metrics(self.run, stage)

    def losses(self, stage: str = "sft") -> list[float]:
        return [line["loss"] for line in self.lines(stage) if line["kind"] == "train"]

    def receipt(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run.root / "stages" / f"{stage}.json").read_text())
        return found


class Stopped(NamedTuple):
    """A training that was disturbed, beside two that were not."""

    calm: tuple[Done, Done]
    stopped: Done
    resumed: Done


class Commands:
    """Starts them."""

    def __init__(self, directory: Path, size: Size) -> None:
        self._directory, self._size = directory, size
        self._pool = ThreadPoolExecutor(size.at_once)
        self._children: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def open(self) -> Iterator[Commands]:
        """Prepare the run that every command gets a copy of."""
        if self._size.on_card:
            self._config = str(_ROOT / "configs" / "quickstart.yaml")
        else:
            base = tiny_base(self._directory / "tiny-base")
            self._config = str(write_config(self._directory, base))
        done = self._medtrain("prepared", "--until", "prepare", hidden=True)
        assert done.code == 0, done.said
        self.prepared = done.run
        try:
            yield self
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for child in self._children:
                if child.poll() is None:
                    child.kill()

    def whole(self) -> Future[Done]:
        settings = ("model.dtype=bfloat16", "merge.into=dequantized", "dpo.log_every=1")
        return self._start("whole", *settings)

    def whole_on_cpu(self) -> Future[Done]:
        """Only for its time."""
        return self._start("whole-cpu", hidden=True)

    def same_steps(self) -> dict[str, Future[Done]]:
        steps = (f"sft.max_steps={self._size.exact_steps}", *_EXACT, *_SFT_ALONE)
        single, half = "model.dtype=float32", "model.dtype=bfloat16"
        return {
            "cpu": self._start("exact-cpu", single, *steps, hidden=True),
            "float32": self._start("exact-float32", single, *steps),
            "bfloat16": self._start("exact-bfloat16", half, *steps),
        }

    def stopped(self) -> Future[Stopped]:
        calm = [self._start(f"calm-{n}", *self._disturbable(), *_SFT_ALONE) for n in (1, 2)]
        disturbed = self._pool.submit(self._stop_and_go_on)

        def together() -> Stopped:
            stopped, resumed = disturbed.result()
            return Stopped((calm[0].result(), calm[1].result()), stopped, resumed)

        return _later(together)

    def expandable(self) -> Future[Done]:
        settings = ("sft.max_steps=4", "model.dtype=bfloat16", *_SFT_ALONE)
        allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        return self._start("expandable", *settings, environment=allocator)

    def _disturbable(self) -> tuple[str, ...]:
        return (f"sft.max_steps={self._size.stopped_steps}", "sft.log_every=1",
                "sft.lora.dropout=0.05", "model.dtype=bfloat16")  # fmt: skip

    def _stop_and_go_on(self) -> tuple[Done, Done]:
        """SIGTERM once the metrics show a step, and the same command again."""
        arguments = (*self._disturbable(), *_SFT_ALONE)

        def stop(child: subprocess.Popen[bytes], run: Run) -> None:
            while child.poll() is None:
                lines = metrics(run, "sft")
                if lines and lines[-1]["step"] >= self._size.stop_at:
                    child.send_signal(signal.SIGTERM)
                    return
                time.sleep(0.005)

        stopped = self._medtrain("stopped", *arguments, meanwhile=stop)
        return stopped, self._medtrain("stopped", *arguments)

    def _start(self, name: str, *arguments: str, **options: Any) -> Future[Done]:
        return self._pool.submit(self._medtrain, name, *arguments, **options)

    def _medtrain(
        self,
        name: str,
        *arguments: str,
        hidden: bool = False,
        environment: dict[str, str] | None = None,
        meanwhile: Callable[[subprocess.Popen[bytes], Run], None] | None = None,
    ) -> Done:
        """Run in the copy of a name; `hidden` from GPUs; `meanwhile` is called while it runs."""
        output, log = self._directory / name, self._directory / f"{name}.log"
        run = Run(output / Path(self._config).stem)
        if name != "prepared" and not output.exists():
            shutil.copytree(self._directory / "prepared", output)
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(self._size.threads),
                        **(environment or {})}  # fmt: skip
        if hidden:
            surroundings["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "medtrain", "run", self._config, f"output_dir={output}"]
        began = time.monotonic()
        with log.open("ab") as said:
            child = subprocess.Popen([*command, *arguments], stdout=said, stderr=said, cwd=_ROOT,
                                     env=surroundings, stdin=subprocess.DEVNULL)  # fmt: skip
            self._children.append(child)
            try:
                if meanwhile is not None:
                    meanwhile(child, run)
                code = child.wait(_LIMIT_S)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        text = log.read_text(errors="replace")[-3000:]
        return Done(code, time.monotonic() - began, run, text)


def metrics(run: Run, stage: Any) -> list[dict[str, Any]]:
    """The whole lines that there are by now."""
    path = run.metrics(stage)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _later(work: Callable[[], Stopped]) -> Future[Stopped]:
    """A future that waits for others, outside the pool that they wait for."""
    alone = ThreadPoolExecutor(1)
    future = alone.submit(work)
    alone.shutdown(wait=False)
    return future
