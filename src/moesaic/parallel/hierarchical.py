"""The exchange in two dimensions: inside each host first, then between hosts, in fewer and larger messages.

H hosts · L ranks on each of them · rank (h, l) is the l-th of host h · C columns of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moesaic.parallel.exchange import EXCHANGES, Exchange, Leg, Pending, Rows, Sizes, spans
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

    def sizes(self, topology: Topology, rows: Rows) -> Sizes:
        place, neighbours_L, grid_HL = _place(topology)
        alike_H = grid_HL[:, place]  # the ranks of this one's place on every host
        direct = super().sizes(topology, rows)
        return Sizes(direct.sends_W, direct.receives_W, rows(neighbours_L, alike_H), rows(alike_H, neighbours_L).T)

    def start(self, topology: Topology, rows_NC: Tensor, sizes: Sizes, kind: str) -> Pending:
        return _TwoLegs(topology, rows_NC, sizes, kind)


class _TwoLegs(Pending):
    def __init__(self, topology: Topology, rows_NC: Tensor, sizes: Sizes, kind: str) -> None:
        assert sizes.through_LH is not None
        self._topology, self._kind, self._through_LH = topology, kind, sizes.through_LH
        self._host = topology.hosts[topology.rank]
        place, _, self._grid_HL = _place(topology)
        self._for_me_HL = sizes.receives_W[self._grid_HL]
        # For the first neighbour first, and for it in the order of the hosts.
        ordered = _reordered(rows_NC, sizes.sends_W, self._grid_HL.T.ravel())
        sends = sizes.sends_W[self._grid_HL].sum(0).tolist()
        receives = self._through_LH.sum(1).tolist()
        self._first: Leg | None = Leg(topology.inside, ordered, sends, receives, place, kind)
        self._second: Leg | None = None

    def advance(self) -> None:
        if self._first is None:
            return
        rows_NC = self._first.wait()
        self._first = None
        by_host = np.arange(self._through_LH.size).reshape(self._through_LH.shape).T.ravel()
        ordered = _reordered(rows_NC, self._through_LH.ravel(), by_host)
        sends, receives = self._through_LH.sum(0).tolist(), self._for_me_HL.sum(1).tolist()
        self._second = Leg(self._topology.across, ordered, sends, receives, self._host, self._kind)

    def wait(self) -> Tensor:
        self.advance()
        assert self._second is not None
        # Where the hosts' ranks stand together it is the order of the ranks already.
        order = self._grid_HL.ravel()
        return _reordered(self._second.wait(), self._for_me_HL.ravel(), np.argsort(order))


def _place(topology: Topology) -> tuple[int, IntArray, IntArray]:
    """This rank's place on its host, the ranks there ``[L]``, and those of all hosts ``[H, L]``."""
    grid_HL = np.array(topology.ranks_by_host)
    neighbours_L = grid_HL[topology.hosts[topology.rank]]
    return int(np.searchsorted(neighbours_L, topology.rank)), neighbours_L, grid_HL


def _reordered(rows_NC: Tensor, sizes: IntArray, order: IntArray) -> Tensor:
    """Segments of so many rows, brought into another order; the same rows where it is theirs."""
    if (np.diff(order) == 1).all():
        return rows_NC
    index = spans((sizes.cumsum() - sizes)[order], sizes[order])
    return rows_NC.index_select(0, torch.from_numpy(index).to(rows_NC.device))


EXCHANGES.register("hierarchical")(Hierarchical())
