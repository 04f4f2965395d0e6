"""What would make the host wait for a GPU, seen on a CPU: operations whose result it must know.

Reading a number, making a tensor of numbers of the host's, and selecting by a mask, whose result is
as long as the mask has hits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_READS = {
    _ATEN._local_scalar_dense.default,
    _ATEN.equal.default,
    _ATEN.is_nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.nonzero.default,
    _ATEN._unique2.default,
    _ATEN.lift_fresh.default,  # torch.tensor of numbers: they are copied from the host
    _ATEN.unique_consecutive.default,
}
_SELECTS = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or (func in _SELECTS and _by_mask(args[1])):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _by_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """The names of such operations, as they come; those of backward passes too."""
    with _Watch() as watch:

        def tolist(tensor: torch.Tensor) -> Any:  # which no dispatcher hears of
            if threading.get_ident() == here:
                watch.seen.append("tolist")
            return theirs(tensor)

        theirs, here = torch.Tensor.tolist, threading.get_ident()
        with mock.patch.object(torch.Tensor, "tolist", tolist):
            yield watch.seen
