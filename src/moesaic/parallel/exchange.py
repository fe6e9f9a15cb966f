"""All-to-all exchanges of rows: who has rows for whom is known to everybody before.

W ranks · H hosts · L ranks on each of them · C columns of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.sent import count
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray
from moesaic.registry import Registry

EXCHANGES: Registry[Exchange] = Registry("exchange")
Rows = Callable[[IntArray, IntArray], IntArray]
"""``[n, m]``: the numbers of rows from n ranks to m ranks, the same whoever asks."""


@dataclass(frozen=True)
class Sizes:
    """What one rank must know of who has rows for whom: as many numbers as there are ranks, a few times.

    Attributes:
        sends_W, receives_W: rows from this rank to each, and from each to this one.
        through_LH: ``[sender's place, receiver's host]`` of what only passes through this rank, where some does.
        back_LH: the same on the way back.
    """

    sends_W: IntArray
    receives_W: IntArray
    through_LH: IntArray | None = None
    back_LH: IntArray | None = None

    def turned(self) -> Sizes:
        """Those of the way back."""
        return Sizes(self.receives_W, self.sends_W, self.back_LH, self.through_LH)

    def chunk(self, index: int, chunks: int) -> Sizes:
        """Those of one chunk: every pair of ranks splits its own evenly."""
        if chunks == 1:
            return self
        split = (None if each is None else part(each, index, chunks) for each in vars(self).values())
        return Sizes(*split)  # type: ignore[arg-type]


def part(whole: IntArray, index: int, parts: int) -> IntArray:
    """How many of so many things are in one of so many parts."""
    return whole * (index + 1) // parts - whole * index // parts


def spans(firsts: IntArray, sizes: IntArray) -> IntArray:
    """The numbers from ``first`` on, as many as ``size`` says, one span after the other."""
    begins: IntArray = sizes.cumsum() - sizes
    numbers: IntArray = np.repeat(firsts - begins, sizes) + np.arange(int(sizes.sum()), dtype=np.int64)
    return numbers


class Pending(ABC):
    """An exchange on its way."""

    @abstractmethod
    def advance(self) -> None:
        """Let what has several legs begin the last one; waits for those before."""

    @abstractmethod
    def wait(self) -> Tensor:
        """``[N, C]``: what has arrived, in the order of the ranks that sent it."""


class Exchange(ABC):
    """One way to move rows; all deliver the same."""

    def refusal(self, topology: Topology) -> str | None:
        """Why it cannot be used there, or None."""
        return None

    def sizes(self, topology: Topology, rows: Rows) -> Sizes:
        """What this rank needs to know for :meth:`start`."""
        rank, everybody = np.array([topology.rank]), np.arange(topology.size)
        return Sizes(rows(rank, everybody)[0], rows(everybody, rank)[:, 0])

    @abstractmethod
    def start(self, topology: Topology, rows_NC: Tensor, sizes: Sizes, kind: str) -> Pending:
        """Begin an exchange; all ranks must begin theirs in the same order.

        Args:
            rows_NC: this rank's rows, those for rank 0 first; contiguous.
            sizes: of this exchange, see :meth:`sizes`.
            kind: what it counts as, see :func:`moesaic.parallel.traffic`.
        """


class Leg:
    """One ``all_to_all_single`` on its way.

    Args:
        sends, receives: rows for and from each rank of the group.
        own: this rank's place in the group: what it sends itself is not counted.
    """

    def __init__(
        self, group: Any, rows_NC: Tensor, sends: Sequence[int], receives: Sequence[int], own: int, kind: str
    ) -> None:
        self.rows = rows_NC.new_empty(sum(receives), *rows_NC.shape[1:])
        self._sent = rows_NC  # must live until it has been sent
        row_bytes = rows_NC.element_size() * rows_NC[:1].numel() if len(rows_NC) else 0
        count(kind, (sum(sends) - sends[own]) * row_bytes)
        self._work = dist.all_to_all_single(self.rows, rows_NC, list(receives), list(sends), group=group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self.rows


class Nothing(Pending):
    """Rows that are there already: no rank has any for another one, so that nobody sends."""

    def __init__(self, rows_NC: Tensor) -> None:
        self._rows = rows_NC

    def advance(self) -> None:
        pass

    def wait(self) -> Tensor:
        return self._rows


class _OneLeg(Pending):
    def __init__(self, leg: Leg) -> None:
        self._leg = leg

    def advance(self) -> None:
        pass

    def wait(self) -> Tensor:
        return self._leg.wait()


class Direct(Exchange):
    """Every rank sends to every other."""

    def start(self, topology: Topology, rows_NC: Tensor, sizes: Sizes, kind: str) -> Pending:
        sends, receives = sizes.sends_W.tolist(), sizes.receives_W.tolist()
        return _OneLeg(Leg(topology.group, rows_NC, sends, receives, topology.rank, kind))


EXCHANGES.register("direct")(Direct())
