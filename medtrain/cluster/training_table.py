"""How the memory of a training stage looks: a line on its work, a row a strategy, the reason.

Widths are those of figures, so that a narrow terminal loses no digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from medtrain.cluster.training_plan import Fitting, Lengths, TrainingPlan
from medtrain.cluster.workload import words
from medtrain.memory import Estimate
from medtrain.memory.estimate import COMMUNICATION, CONTEXT, FRAGMENTATION, GIB, trained_parameters

_BARS = "▁▂▃▄▅▆▇█"
COLUMNS = {
    "weights": "weights", "gathered": "gathered", "adapter": "adapters", "gradients": "gradients",
    "optimizer": "optimizer", "activations": "activations", "logits": "logits",
    "new_rows": "new tokens", "other": "other", "load": "loading", "peak": "peak",
}  # fmt: skip
"""Parts of an estimate, and what they are called."""
_ALWAYS = {"weights", "adapter", "gradients", "optimizer", "activations", "logits", "other",
           "peak"}  # fmt: skip
_NO_PARTS = {"other", "load", "peak"}


def training_views(plan: TrainingPlan) -> Iterator[Table | Text]:
    """What is known about one training stage."""
    yield Text(f"{plan.stage}: {_where(plan)}{_what(plan.fitting)}", style="bold")
    yield Text(f"  {_reads(plan)}")
    if plan.lengths is not None:
        yield Text(f"  {_spread(plan.lengths)}")
    if plan.fitting is not None:
        yield _table(plan, plan.fitting)
    if plan.gpus:
        mark = ("  → ", "green") if plan.choice.fits else ("  ✗ ", "red")
        yield Text.assemble(mark, plan.choice.reason)
    yield Text(f"  attention: {plan.paths.attention}")
    yield Text(
        f"  computes in {plan.paths.precision}; adapters {plan.paths.lora}; "
        f"optimizer {plan.paths.optimizer}"
    )
    if plan.in_16_bits is not None:
        yield Text(
            f"  The base would fit in 16 bits too ({plan.in_16_bits.peak / GIB:.1f} GiB): "
            "model.quantization=none unpacks no weights, and has no rounding of NF4 to learn with.",
            style="dim",
        )
    if plan.fitting and any(one.checkpointing for one in plan.fitting.estimates):
        yield Text("  * with activation checkpointing", style="dim")


def about_memory() -> str:
    """What the peaks are made of."""
    return (
        f"Memory: estimated; other: {CONTEXT / GIB:g} GiB for CUDA, {COMMUNICATION / GIB:g} GiB "
        f"for NCCL where there are several GPUs, {FRAGMENTATION:.0%} for fragmentation, and what "
        "an evaluation needs beyond that; loading: where it takes more than training, since every "
        "GPU holds the base whole until it is sharded, and the peak is the larger of the two. "
        "Activations are those of the largest forward pass that batch_size and max_length allow."
    )


def _where(plan: TrainingPlan) -> str:
    if not plan.gpus:
        return "no GPU"
    nodes = f"{plan.nodes} nodes × " if plan.nodes > 1 else ""
    assumed = ", which is assumed" if plan.assumed else ""
    return f"{nodes}{plan.gpus} × {plan.gpu.name} ({plan.gpu.memory_gib:g} GiB each{assumed})"


def _what(fitting: Fitting | None) -> str:
    if fitting is None:
        return ""
    parameters = fitting.architecture.parameters
    trained = trained_parameters(fitting.architecture, fitting.work)
    return (
        f"; {_millions(parameters.total)} parameters (embeddings "
        f"{_millions(parameters.embeddings + parameters.head)}, attention "
        f"{_millions(parameters.attention)}, MLP {_millions(parameters.mlp)}), "
        f"{_millions(trained)} trained"
    )


def _millions(count: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def _reads(plan: TrainingPlan) -> str:
    load = plan.load
    if load.steps is None or load.tokens is None:
        return f"{load.rows_a_step} rows a step; how many steps is known after `medtrain prepare`"
    return f"{load.steps:,} steps of {load.rows_a_step} rows, {words(load.tokens)} tokens"


def _spread(lengths: Lengths) -> str:
    most = max(lengths.rows)
    bars = "".join(
        _BARS[-(-rows * (len(_BARS) - 1) // most)] if rows else " " for rows in lengths.rows
    )
    return (
        f"tokens of a row: 1 {bars} {lengths.width * len(lengths.rows):,}; "
        f"mean {lengths.mean:,.0f}, 95 % up to {lengths.p95:,}, longest {lengths.longest:,}"
    )


def _table(plan: TrainingPlan, fitting: Fitting) -> Table:
    shown = [part for part in COLUMNS if part in _ALWAYS or any(
        figure(one, part) for one in fitting.estimates
    )]  # fmt: skip
    rows = [_cells(one, shown, plan.gpu.memory_bytes) for one in fitting.estimates]
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    for place, column in enumerate(("", *(COLUMNS[part] for part in shown), "")):
        widest = max(len(column), *(len(cells[place]) for cells in rows))
        table.add_column(column, justify="right" if column else "left", min_width=widest)
    for one, cells in zip(fitting.estimates, rows, strict=True):
        table.add_row(*cells, style=None if one.strategy == plan.choice.strategy else "dim")
    return table


def _cells(one: Estimate, shown: Sequence[str], gpu_bytes: int) -> list[str]:
    name = f"  {one.strategy}{'*' if one.checkpointing else ''}"
    sizes = [_size(figure(one, part)) for part in shown]
    if "load" in shown and not figure(one, "load"):
        sizes[shown.index("load")] = ""  # less than what training needs
    return [name, *sizes, "fits" if one.peak <= gpu_bytes else "too large"]


def figure(one: Estimate, part: str) -> float:
    """Bytes of one of COLUMNS; those of all but `load` and `peak` add up to what training needs."""
    if part == "activations":
        # A layer and the output layer are not at work at the same time.
        return one.activations + max(0.0, one.temporary - one.logits - one.new_rows)
    if part == "other":
        parts = sum(figure(one, part) for part in COLUMNS if part not in _NO_PARTS)
        return max(0.0, one.allocated + one.overhead - parts)
    if part == "load":
        return one.load if one.load >= one.peak else 0.0
    value: float = getattr(one, part)
    return value


def _size(size: float) -> str:
    for unit, scale in (("G", GIB), ("M", 2.0**20)):
        if size >= 0.995 * scale:
            return f"{size / scale:.3g} {unit}"
    return "0" if size < 1 else f"{size / 1024:.3g} k"
