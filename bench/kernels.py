"""The part `attention` of bench/gpu.py: the kernels of packed rows beside each other.

24 rows as long as MedQuAD's, one layer of an 8B's heads → forward and backward by every kernel that
this machine offers → milliseconds, beside row by row, and the distance from float32's result. Then
the same with lengths that no pass had before: a kernel that plans anew for each shows there.
"""

from __future__ import annotations

from typing import Any

from random_rows import ROW_TOKENS
from record import Record, milliseconds

HEADS, KV_HEADS, HEAD_DIM, ROWS = 32, 8, 128, 24


def attention(record: Record) -> None:
    """Every kernel."""
    import torch

    from medtrain.attention.choice import choose
    from medtrain.attention.trial import Shape, facts_of

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads = (4, 2, 16) if record.tiny else (HEADS, KV_HEADS, HEAD_DIM)
    shape = Shape(device, dtype, *heads, windowed=False)
    baseline: dict[str, float] = {}
    offered = [choice.kernel for choice in choose(facts_of(shape))]
    for kernel in sorted(offered, key=lambda name: name != "rows"):  # the baseline first

        def one(kernel: Any = kernel) -> None:
            seen, new, apart = _times(kernel, shape, 4 if record.tiny else ROWS)
            baseline.setdefault("ms", seen)
            record.figure(
                f"attention by {kernel}",
                f"{seen:.2f} ms forward and backward, {baseline['ms'] / seen:.2f} times row by row;"
                f" lengths not seen before {new:.2f} ms; {apart:.1e} from float32",
                ms=seen, new_lengths_ms=new, apart=apart,
            )  # fmt: skip

        record.attempt(kernel, one, seconds=6)


def _times(kernel: Any, shape: Any, rows: int) -> tuple[float, float, float]:
    """Milliseconds of lengths that repeat and of new ones, and the distance from float32."""
    from medtrain.attention.kernels import attend_by
    from medtrain.attention.trial import distance_from_rows

    lengths = [ROW_TOKENS[(i * 7) % len(ROW_TOKENS)] for i in range(rows)]
    seen = milliseconds(_pass(kernel, shape, lengths), repeats=5, warm=3)
    others = iter(range(1, 1000))

    def unseen() -> None:
        more = next(others)
        _pass(kernel, shape, [length + more for length in lengths])()

    new = milliseconds(unseen, repeats=3, warm=1)
    return seen, new, distance_from_rows(attend_by(kernel), shape, None)


def _pass(kernel: Any, shape: Any, lengths: list[int]) -> Any:
    """Forward and backward of rows of some lengths."""
    import torch

    from medtrain.attention.kernels import Rows, attend_by

    tokens = sum(lengths)
    sizes = [(1, heads, tokens, shape.head_dim)
             for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]  # fmt: skip
    drawn = [torch.randn(size, device=shape.device, dtype=shape.dtype, requires_grad=True)
             for size in sizes]  # fmt: skip
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = Rows(tuple(lengths), borders.to(shape.device))

    def work() -> None:
        for part in drawn:
            part.grad = None
        query, key, value = drawn
        output: Any = attend_by(kernel)(query, key, value, rows, shape.head_dim**-0.5, None)
        output.sum().backward()

    return work
