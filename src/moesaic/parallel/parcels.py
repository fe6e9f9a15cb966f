"""Parts of experts' slices on their way between ranks, as columns of numbers.

P parcels · N parts (slices of experts) that travel · W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesaic.parallel.workload import IntArray

# Pieces of all relayed parts together, at most, that one rank gets: with thousands of ranks it is Python that handles
# each of them. Parts of which many travel are spread over their owners as they are.
MOST_PIECES = 2048


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
    """What one rank sends and receives in one exchange: ``[P, 6]`` int64, a row a :class:`Parcel`."""

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


@dataclass(frozen=True)
class Parts:
    """Slices of experts that travel.

    Attributes:
        expert_N, slice_N, owner_N: which they are, and whose, in rising order of expert and slice.
        elements_N: their sizes.
        turn_N: where each one's relays begin among its receivers, see :func:`relays`.
    """

    expert_N: IntArray
    slice_N: IntArray
    owner_N: IntArray
    elements_N: IntArray
    turn_N: IntArray

    def of(self, chosen: IntArray) -> Parts:
        """Some of them."""
        return Parts(*(each[chosen] for each in vars(self).values()))


def relays(receives_WN: npt.NDArray[np.bool_], most: int, turn_N: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Pieces of each part, ``[N]``, 1 being the whole; and who gets which from the owner, to pass it on.

    Every receiver of a part is one of its relays, or as many as may be: then those of other parts are other ones.

    Args:
        most: relays of a part, at most.
        turn_N: the first relay of a part is the receiver of that place, counted round and round.

    Returns:
        ``[N]``, and ``[W, N]``: whether a rank is a relay of a part.
    """
    receivers_N = receives_WN.sum(0)
    pieces_N = np.where(receivers_N > 1, np.minimum(receivers_N, most), 1).clip(min=1)
    place_WN = np.cumsum(receives_WN, axis=0) - 1 - turn_N
    passes_WN = receives_WN & (pieces_N > 1) & (place_WN % np.maximum(1, receivers_N) < pieces_N)
    return pieces_N, passes_WN


def direct(parts: Parts, receives_WN: npt.NDArray[np.bool_]) -> IntArray:
    """``[P, 6]``: each owner sends everything to each receiver.

    Args:
        receives_WN: which rank gets what.
    """
    index, receiver = receives_WN.T.nonzero()
    return _rows(parts, index, parts.owner_N[index], receiver, np.zeros_like(index), parts.elements_N[index])


def relayed(parts: Parts, receives_WN: npt.NDArray[np.bool_], most: int, rank: int) -> tuple[IntArray, IntArray]:
    """What a rank sends and receives, ``[P, 6]``, in two exchanges: owners scatter pieces over relays, which pass
    theirs on to all other receivers, so that every byte leaves its owner once. What has no relays goes directly.

    Args:
        most: relays of a part, at most.
    """
    pieces_N, passes_WN = relays(receives_WN, most, parts.turn_N)
    is_relayed_N = pieces_N > 1
    is_mine_WN = (parts.owner_N == rank) | (np.arange(len(receives_WN)) == rank)[:, None]
    whole = direct(parts, receives_WN & ~is_relayed_N & is_mine_WN)
    order = np.flatnonzero(is_relayed_N)
    parts, pieces_N = parts.of(order), pieces_N[order]
    receives_WN, passes_WN = receives_WN[:, order], passes_WN[:, order]
    index, relay = passes_WN.T.nonzero()  # part by part, its relays in rising order
    firsts_N = np.cumsum(pieces_N) - pieces_N
    step_N = -(-parts.elements_N // pieces_N)
    first = np.minimum((np.arange(len(index)) - firsts_N[index]) * step_N[index], parts.elements_N[index])
    last = np.minimum(first + step_N[index], parts.elements_N[index])
    scattered = _rows(parts, index, parts.owner_N[index], relay, first, last)
    # This rank's own pieces to all others, and all others' pieces to this rank.
    mine = np.flatnonzero(relay == rank)
    piece, taker = (receives_WN[:, index[mine]] & (np.arange(len(receives_WN)) != rank)[:, None]).T.nonzero()
    sent = mine[piece]
    got = np.flatnonzero(receives_WN[rank, index] & (relay != rank))
    passed = [
        _rows(parts, index[sent], relay[sent], taker, first[sent], last[sent]),
        _rows(parts, index[got], relay[got], np.full(len(got), rank), first[got], last[got]),
    ]
    rows = np.concatenate([whole, scattered])
    rows = rows[(rows[:, 0] == rank) | (rows[:, 1] == rank)]
    # In the order of experts and slices, which both ends of every exchange go by.
    return rows[np.lexsort((rows[:, 3], rows[:, 2]))], np.concatenate(passed)


def _rows(
    parts: Parts, index: IntArray, sender: IntArray, receiver: IntArray, first: IntArray, last: IntArray
) -> IntArray:
    columns = [sender, receiver, parts.expert_N[index], parts.slice_N[index], first, last]
    rows: IntArray = np.stack(columns, axis=1)
    return rows


def _listed(rows: IntArray) -> list[Parcel]:
    return [Parcel(*row) for row in rows.tolist()]
