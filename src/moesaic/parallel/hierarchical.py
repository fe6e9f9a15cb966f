"""The exchange in two dimensions: inside each host first, then between hosts, in fewer and larger messages.

H hosts · L ranks on each of them · rank (h, l) is the l-th of host h · C columns of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from moesaic.parallel.exchange import EXCHANGES, Exchange, Leg, Pending
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray


class Hierarchical(Exchange):
    """Two-dimensional all-to-all (Tutel: Adaptive Mixture-of-Experts at Scale, section 3.4, algorithm 3).

    Rank (h, l) hands everything that is for the l'-th rank of any host to its neighbour (h, l'), which sends what the
    L ranks of h have for (h', l') to it in one message: H - 1 messages between hosts a rank instead of (H - 1) · L.
    """

    def refusal(self, topology: Topology) -> str | None:
        if topology.is_grid:
            return None
        return "it needs several hosts with the same number of ranks, more than one, on each"

    def start(self, topology: Topology, rows_NC: Tensor, rows_WW: IntArray, kind: str) -> Pending:
        return _TwoLegs(topology, rows_NC, rows_WW, kind)


class _TwoLegs(Pending):
    def __init__(self, topology: Topology, rows_NC: Tensor, rows_WW: IntArray, kind: str) -> None:
        self._topology, self._kind = topology, kind
        rank = topology.rank
        grid_HL = np.array(topology.ranks_by_host)
        self._host = topology.hosts[rank]
        neighbours_L = grid_HL[self._host]
        self._place = int(np.flatnonzero(neighbours_L == rank)[0])
        # [sender's place, receiver's host] of what passes through this rank, and [sender's host, sender's place] of
        # what is for it.
        self._through_LH = rows_WW[np.ix_(neighbours_L, grid_HL[:, self._place])]
        self._for_me_HL = rows_WW[grid_HL, rank]
        self._grid_HL = grid_HL
        to_ranks = _segments(rows_NC, rows_WW[rank].tolist())
        # For the first neighbour first, and for it in the order of the hosts.
        ordered = _joined([to_ranks[each] for each in grid_HL.T.flatten().tolist()], rows_NC)
        sends = rows_WW[rank][grid_HL].sum(0).tolist()
        receives = self._through_LH.sum(1).tolist()
        self._first: Leg | None = Leg(topology.inside, ordered, sends, receives, self._place, kind)
        self._second: Leg | None = None

    def advance(self) -> None:
        if self._first is None:
            return
        rows_NC = self._first.wait()
        self._first = None
        num_senders, num_hosts = self._through_LH.shape
        parts = _segments(rows_NC, self._through_LH.flatten().tolist())
        by_host = [parts[sender * num_hosts + host] for host in range(num_hosts) for sender in range(num_senders)]
        sends, receives = self._through_LH.sum(0).tolist(), self._for_me_HL.sum(1).tolist()
        joined = _joined(by_host, rows_NC)
        self._second = Leg(self._topology.across, joined, sends, receives, self._host, self._kind)

    def wait(self) -> Tensor:
        self.advance()
        assert self._second is not None
        rows_NC = self._second.wait()
        order = self._grid_HL.flatten()
        if (np.diff(order) > 0).all():  # the hosts' ranks stand together: it is the order of the ranks
            return rows_NC
        parts = _segments(rows_NC, self._for_me_HL.flatten().tolist())
        return _joined([parts[index] for index in np.argsort(order).tolist()], rows_NC)


def _segments(rows_NC: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(rows_NC, list(sizes))


def _joined(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    there = [part for part in parts if len(part)]
    return torch.cat(there) if there else like[:0]


EXCHANGES.register("hierarchical")(Hierarchical())
