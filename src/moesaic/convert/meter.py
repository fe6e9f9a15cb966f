"""How much memory a conversion uses: a counter of the bytes that are alive in what it has read and not yet written."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Meter:
    """Bytes alive in the tensors that it was shown; a storage that several tensors share counts once.

    A :class:`moesaic.convert.source.TensorSource` shows every tensor that it reads, and
    :func:`moesaic.convert.writing.write_model` every one that it holds for a shard. ``alive`` and ``peak`` are in
    bytes; a tensor stops counting when its storage is freed.
    """

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0
        self._seen: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> Tensor:
        """Count ``tensor`` until its storage is freed; returns it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = size
            self.alive += size
            self.peak = max(self.peak, self.alive)
            # The Python object of a storage goes with the last tensor that has it.
            weakref.finalize(storage, self._forget, key)
        return tensor

    def _forget(self, key: int) -> None:
        self.alive -= self._seen.pop(key, 0)


_METERS: list[Meter] = []


def watch(tensor: Tensor) -> Tensor:
    """Show a tensor to every meter that is counting; returns it."""
    for meter in _METERS:
        meter.watch(tensor)
    return tensor


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what conversions read and hold inside the block."""
    meter = Meter()
    _METERS.append(meter)
    try:
        yield meter
    finally:
        _METERS.remove(meter)
