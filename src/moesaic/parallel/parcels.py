"""Parts of experts' slices on their way between ranks, as columns of numbers.

P parcels · W ranks · E experts · S slices of an expert's hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesaic.parallel.workload import IntArray


class Parcel(NamedTuple):
    """Elements ``[first, last)`` of one slice of one expert, all its fields in a row."""

    sender: int
    receiver: int
    expert: int
    slice_: int
    first: int
    last: int


@dataclass(frozen=True)
class Parcels:
    """What travels in one exchange: ``[P, 6]`` int64, a row a :class:`Parcel`. Every rank knows all of them."""

    rows: IntArray

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Parcel]:
        return iter(_listed(self.rows))

    def sent_by(self, rank: int) -> list[Parcel]:
        """In the order of the receivers, which is that of the exchange."""
        mine = self.rows[self.rows[:, 0] == rank]
        return _listed(mine[np.argsort(mine[:, 1], kind="stable")])

    def received_by(self, rank: int) -> list[Parcel]:
        """In the order of the senders; those of one sender as it sent them."""
        mine = self.rows[self.rows[:, 1] == rank]
        return _listed(mine[np.argsort(mine[:, 0], kind="stable")])

    def turned(self) -> Parcels:
        """The same the other way round."""
        return Parcels(self.rows[:, [1, 0, 2, 3, 4, 5]])


def direct(needs_ESW: npt.NDArray[np.bool_], owner_ES: IntArray, elements_S: IntArray) -> list[Parcels]:
    """Each owner sends everything to each receiver.

    Args:
        needs_ESW: which rank needs what from another.
    """
    expert, slice_, receiver = needs_ESW.nonzero()
    owner = owner_ES[expert, slice_]
    columns = [owner, receiver, expert, slice_, np.zeros_like(owner), elements_S[slice_]]
    return _phases([np.column_stack(columns)])


def relay(needs_ESW: npt.NDArray[np.bool_], owner_ES: IntArray, elements_S: IntArray) -> list[Parcels]:
    """Each owner scatters pieces over the receivers, which pass theirs on to each other: every byte leaves it once."""
    first, second = [], []
    for expert, slice_ in zip(*np.nonzero(needs_ESW.any(2)), strict=True):
        receivers = needs_ESW[expert, slice_].nonzero()[0]
        size, count = int(elements_S[slice_]), len(receivers)
        step = -(-size // count)
        starts = np.minimum(np.arange(count) * step, size)
        about = np.broadcast_to([expert, slice_], (count, 2))
        span = np.stack([starts, np.minimum(starts + step, size)], axis=1)
        owner = np.full(count, owner_ES[expert, slice_])
        first.append(np.column_stack([owner, receivers, about, span]))
        passer, taker = np.nonzero(~np.eye(count, dtype=bool))
        second.append(np.column_stack([receivers[passer], receivers[taker], about[passer], span[passer]]))
    return _phases([np.concatenate(rows) if rows else np.empty((0, 6), np.int64) for rows in (first, second)])


def _phases(rows: list[IntArray]) -> list[Parcels]:
    return [Parcels(each) for each in rows if len(each)]


def _listed(rows: IntArray) -> list[Parcel]:
    return [Parcel(*row) for row in rows.tolist()]
