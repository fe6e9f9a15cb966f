"""Task vectors: what fine-tuning has added to each weight of the base, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Read = Callable[[slice], Tensor]
"""Rows of one tensor of one model."""


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor: ``base`` (``[R, ...]`` float32), and of every fine-tuned model what it adds to them.

    ``rows`` says which rows of the tensor they are.
    """

    rows: slice
    base: Tensor
    deltas: tuple[Tensor, ...]


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors τ = θ − θ₀ of one tensor (Editing Models with Task Arithmetic, section 2), in pieces.

    It can be gone through as often as a method needs: each time the rows are read again, so that no more than one piece
    of each model is in memory.

    Args:
        name: the tensor's. shape: its own; at least one dimension.
        base: reads θ₀. models: read each fine-tuned θ.
        rows: of a piece.
    """

    name: str
    shape: tuple[int, ...]
    base: Read
    models: Sequence[Read]
    rows: int

    @property
    def size(self) -> int:
        """Number of values of the tensor."""
        return int(torch.Size(self.shape).numel())

    def __iter__(self) -> Iterator[Piece]:
        for start in range(0, self.shape[0], self.rows):
            rows = slice(start, min(start + self.rows, self.shape[0]))
            base = self.base(rows).float()
            yield Piece(rows, base, tuple(read(rows).float() - base for read in self.models))


def magnitudes_at(vectors: TaskVectors, ranks: Sequence[int]) -> list[list[float]]:
    """Of every task vector, the ``rank``-th largest magnitude for each of ``ranks`` (from 1 on): exact.

    Instead of sorting, which needs the whole tensor at once, values are counted by the upper half of their bits, then
    those that share the upper half of the one looked for by the lower half: the bits of positive floats are ordered as
    they are. It reads the tensor twice.
    """
    upper = np.zeros((len(vectors.models), 1 << 15), dtype=np.int64)
    for piece in vectors:
        for counts, delta in zip(upper, piece.deltas, strict=True):
            counts += np.bincount(_bits(delta) >> 16, minlength=1 << 15)
    above = [[_place(counts, rank) for rank in ranks] for counts in upper]
    lower = np.zeros((len(vectors.models), len(ranks), 1 << 16), dtype=np.int64)
    for piece in vectors:
        for each, places, delta in zip(lower, above, piece.deltas, strict=True):
            bits = _bits(delta)
            for counts, (high, _) in zip(each, places, strict=True):
                counts += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    found = []
    for each, places in zip(lower, above, strict=True):
        lows = [_place(counts, rank)[0] for counts, (_, rank) in zip(each, places, strict=True)]
        bits = np.array([high << 16 | low for (high, _), low in zip(places, lows, strict=True)], dtype=np.int32)
        found.append([float(value) for value in bits.view(np.float32)])
    return found


def _bits(delta: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return delta.abs().reshape(-1).contiguous().view(torch.int32).numpy()


def _place(counts: np.ndarray[tuple[int], np.dtype[np.int64]], rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest value, and which one in its bin that is."""
    at_least = counts[::-1].cumsum()[::-1]
    place = int(np.flatnonzero(at_least >= rank)[-1])
    return place, rank - int(at_least[place] - counts[place])
