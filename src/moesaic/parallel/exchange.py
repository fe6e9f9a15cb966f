"""All-to-all exchanges of rows: who has rows for whom is known to everybody before.

W ranks · H hosts · L ranks on each of them · C columns of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.sent import count
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray
from moesaic.registry import Registry

EXCHANGES: Registry[Exchange] = Registry("exchange")


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

    @abstractmethod
    def start(self, topology: Topology, rows_NC: Tensor, rows_WW: IntArray, kind: str) -> Pending:
        """Begin an exchange; all ranks must begin theirs in the same order.

        Args:
            rows_NC: this rank's rows, those for rank 0 first; contiguous.
            rows_WW: ``[from, to]`` numbers of rows, the same on all ranks.
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

    def start(self, topology: Topology, rows_NC: Tensor, rows_WW: IntArray, kind: str) -> Pending:
        rank = topology.rank
        sends, receives = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
        return _OneLeg(Leg(topology.group, rows_NC, sends, receives, rank, kind))


EXCHANGES.register("direct")(Direct())
