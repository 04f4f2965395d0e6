"""Batches that are read, collated and made ready for the GPU while it computes.

an iterator of batches → a thread that stays a few batches ahead of whoever takes them, and moves
their tensors to page-locked memory, from which they are copied without waiting → the same batches
in the same order. What goes wrong in the thread is raised where the batch is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

AHEAD = 2
"""Batches that are ready before they are asked for."""

_T = TypeVar("_T")


class ReadAhead(Generic[_T]):
    """An iterator, read by a thread of its own."""

    def __init__(
        self,
        source: Iterator[_T],
        prepare: Callable[[_T], _T] | None = None,
        *,
        device: torch.device | None = None,
        ahead: int = AHEAD,
    ) -> None:
        """Begin to read.

        Args:
            source: nobody else may read from it.
            prepare: what the thread does to each of its items.
            device: the GPU that the process computes on, if it has one.
            ahead: items at most that are read and not yet taken.
        """
        self.source = source
        self._prepare, self._device = prepare, device
        self._ready: SimpleQueue[tuple[_T | None, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._read, name="medtrain-reading", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        """The next item, waited for where it is not ready.

        Raises:
            StopIteration: there is none.
            BaseException: whatever the source raised.
        """
        if self._ended:
            raise StopIteration
        item, error = self._ready.get()
        self._room.release()
        if error is not None:
            self.close()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; what it has read is dropped."""
        self._ended = self._closed = True
        self._room.release()
        self._thread.join()

    def _read(self) -> None:
        try:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread begins with the first one
            while True:
                self._room.acquire()
                if self._closed:
                    return
                item = next(self.source)
                self._ready.put((self._prepare(item) if self._prepare else item, None))
        except BaseException as error:
            self._ready.put((None, error))


def pinned(value: Any) -> Any:
    """Tensors of dictionaries, tuples and dataclasses with `pinned`, in page-locked memory."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: pinned(item) for key, item in value.items()}
    return value
