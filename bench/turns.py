"""How two ways to train are timed side by side: bench/train.py and bench/gpu.py.

the same callback in both sides' trainers → seconds of the optimiser steps after the first → `Side`
→ both take turns → medians of tokens a second, and of the turns' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import TrainerCallback

BASELINE, OURS = "plain TRL", "medtrain"


class Spent(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float
    """Of all threads of this process."""


class Side(NamedTuple):
    """What one side did in one turn."""

    tokens: int
    """Real ones of the timed steps; padding does not count."""
    spent: Spent
    loss: float
    """Mean of the last logged steps, per token or per pair."""
    forwards: float
    """Forward passes a step that have a backward pass."""
    peak_bytes: int | None = None
    """Most that was allocated on the GPU."""


class StopWatch:
    """Seconds since it was started; waits for the GPU where there is one."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._began = _now()

    def read(self) -> Spent:
        """What was spent since."""
        now = _now()
        return Spent(now.wall - self._began.wall, now.cpu - self._began.cpu)


def _now() -> Spent:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Spent(time.perf_counter(), time.process_time())


@dataclass
class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the optimiser steps after the first, which warms up."""

    spent: Spent = field(default_factory=lambda: Spent(0.0, 0.0))
    loss: float = float("nan")
    """As logged last."""
    steps: int = 0
    _watch: StopWatch = field(default_factory=StopWatch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start after the first step, stop after the last."""
        self.steps = state.global_step
        if state.global_step == 1:
            self._watch.start()
        if state.global_step == state.max_steps:
            self.spent = self._watch.read()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])


@dataclass
class OurClocks:
    """What is counted while medtrain trains."""

    training: StepClock = field(default_factory=StepClock)
    forwards: int = 0
    longest: int = 0
    """Tokens of the largest forward pass."""
    reference: StopWatch | None = None
    """Runs since the reference's model was loaded."""

    def side(self, tokens: int, reference: Spent | None = None) -> Side:
        """A turn: training, and what the reference took."""
        spent = [self.training.spent] + ([reference] if reference else [])
        return Side(
            tokens,
            Spent(sum(s.wall for s in spent), sum(s.cpu for s in spent)),
            self.training.loss,
            self.forwards / self.training.steps,
        )


@contextmanager
def our_clocks() -> Iterator[OurClocks]:
    """Put clocks into medtrain's trainers and its reference."""
    from medtrain.train import log_probs
    from medtrain.train.speed import SpeedMeter
    from medtrain.train.step import StepTrainer

    clocks = OurClocks()
    feed, computed = StepTrainer.feed, SpeedMeter.computed

    def feed_clocked(trainer: Any, *arguments: Any) -> None:
        feed(trainer, *arguments)
        trainer.add_callback(clocks.training)

    def computed_counted(meter: SpeedMeter, forward: Any) -> None:
        clocks.forwards += 1
        clocks.longest = max(clocks.longest, int(forward.inputs["attention_mask"].sum()))
        computed(meter, forward)

    class Scorer(log_probs.AnswerScorer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            clocks.reference = StopWatch()

    with (
        mock.patch.object(StepTrainer, "feed", feed_clocked),
        mock.patch.object(SpeedMeter, "computed", computed_counted),
        mock.patch.object(log_probs, "AnswerScorer", Scorer),
    ):
        yield clocks


def take_turns(
    baseline: Callable[[int], Side], ours: Callable[[int], Side], repeats: int
) -> list[tuple[Side, Side]]:
    """Both sides by turns; each is called with the number of the turn."""
    return [(baseline(number), ours(number)) for number in range(repeats)]


def tell(title: str, turns: Sequence[tuple[Side, Side]], *, cpu: bool) -> None:
    """Print a table of medians.

    Args:
        title: what was trained.
        turns: baseline and ours.
        cpu: whether processor seconds mean anything: on a GPU they do not.
    """
    print(title)
    for name, sides in zip((BASELINE, OURS), zip(*turns, strict=True), strict=True):
        rates = f"{median(s.tokens / s.spent.wall for s in sides):>9,.0f} tokens/s"
        if cpu:
            rates += f" {median(s.tokens / s.spent.cpu for s in sides):>9,.0f} tokens/cpu-s"
        print(f"  {name:<10}{rates}   {median(s.forwards for s in sides):.2f} forward passes a step"
              f"   loss {median(s.loss for s in sides):.4f}")  # fmt: skip
    wall = [plain.spent.wall / ours.spent.wall for plain, ours in turns]
    ratios = f"{median(wall):.2f} by the wall clock ({min(wall):.2f} to {max(wall):.2f})"
    if cpu:
        each = [plain.spent.cpu / ours.spent.cpu for plain, ours in turns]
        ratios = f"{median(each):.2f} by the cpu ({min(each):.2f} to {max(each):.2f}), {ratios}"
    print(f"  ratio     {ratios}", flush=True)
