"""How much a plan moves and computes, rank by rank: the sums over :class:`Schedule`, without its large matrices.

W ranks · E experts · B blocks · H hosts · L ranks on each of them · C classes of links (inside a host, between hosts).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesaic.parallel.parcels import Parts, relays
from moesaic.parallel.plan import Plan
from moesaic.parallel.schedule import BoolArray, Schedule
from moesaic.parallel.workload import IntArray, Workload

FloatArray = npt.NDArray[np.float64]
# Parts whose receivers are looked at together: it bounds the memory that thousands of ranks take.
_TOGETHER = 1024


@dataclass(frozen=True)
class Places:
    """Which rank is on which host, in the forms that sums need.

    Attributes:
        host_W: each rank's host.
        hosts: their number.
        spans: for each host the slice of ranks, or None where a host's ranks do not stand together.
        peers_CW: other ranks on the same host, and on other hosts.
    """

    host_W: IntArray
    hosts: int
    spans: tuple[slice, ...] | None
    peers_CW: IntArray

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(hosts: tuple[int, ...]) -> Places:
        """Of each rank's host, see :class:`Topology`."""
        host_W = np.array(hosts, dtype=np.int64)
        sizes_H = np.bincount(host_W)
        ends_H = np.cumsum(sizes_H)
        spans = None
        if (np.diff(host_W) >= 0).all():
            spans = tuple(slice(int(end - size), int(end)) for end, size in zip(ends_H, sizes_H, strict=True))
        inside_W = sizes_H[host_W] - 1
        return Places(host_W, len(sizes_H), spans, np.stack([inside_W, len(host_W) - 1 - inside_W]))

    def by_host(self, values_W: npt.NDArray[np.generic]) -> FloatArray:
        """``[H]``: sums over each host's ranks."""
        return np.bincount(self.host_W, weights=values_W, minlength=self.hosts).astype(np.float64)


@dataclass(frozen=True)
class Flow:
    """One exchange: what each rank sends and receives over each class of links, in rows or elements.

    Attributes:
        out_CW, in_CW: ``[2, W]``, inside a host and between hosts.
        messages_C: the most messages that a rank sends, whatever their size.
        passed_W: what a rank copies on the way, because it only passes it on.
    """

    out_CW: FloatArray
    in_CW: FloatArray
    messages_C: tuple[int, int]
    passed_W: FloatArray | None = None

    def back(self) -> Flow:
        """The same the other way round."""
        return Flow(self.in_CW, self.out_CW, self.messages_C, self.passed_W)


@dataclass(frozen=True)
class Volume:
    """What one pass of a plan moves and computes.

    Attributes:
        tokens, results: legs of the rows' exchange to the experts and of the one back, in rows.
        weights: phases of the gather, in elements.
        sent_W, received_W: rows that a rank sends and receives, those for itself included.
        own_slots_W, own_active_W: slots on own experts, and how many of these have any, at 1/replicas of their width.
        fetched_slots_W, fetched_active_W: the same on fetched experts, which are whole.
        replicas, members: see :class:`Plan` and :class:`Schedule`.
    """

    tokens: tuple[Flow, ...]
    results: tuple[Flow, ...]
    weights: tuple[Flow, ...]
    sent_W: IntArray
    received_W: IntArray
    own_slots_W: IntArray
    own_active_W: IntArray
    fetched_slots_W: IntArray
    fetched_active_W: IntArray
    replicas: int
    members: int


@dataclass
class Volumes:
    """The volumes of plans for one workload: what several plans have in common is added up once."""

    workload: Workload
    places: Places
    _amounts: dict[tuple[object, ...], _Amounts] = field(default_factory=dict)
    _rows: dict[tuple[object, ...], tuple[tuple[Flow, ...], tuple[Flow, ...]]] = field(default_factory=dict)
    _weights: dict[tuple[object, ...], tuple[Flow, ...]] = field(default_factory=dict)

    def of(self, plan: Plan) -> Volume:
        """The volume of a plan.

        Raises:
            ConfigError: where ``plan.replicas`` does not divide the number of slices.
        """
        schedule = Schedule(plan, self.workload)
        key = (plan.fetched, plan.least, plan.replicas)
        if key not in self._amounts:
            whole = self.workload.layout.slices == 1
            self._amounts[key] = _whole(schedule) if whole else _sliced(schedule)
        amounts = self._amounts[key]
        if (*key, plan.exchange) not in self._rows:
            self._rows[*key, plan.exchange] = _there_and_back(amounts.rows_WW, plan.exchange, self.places)
        if (*key, plan.gather) not in self._weights:
            self._weights[*key, plan.gather] = tuple(_weight_flows(schedule, self.places))
        there, back = self._rows[*key, plan.exchange]
        return Volume(
            there,
            back,
            self._weights[*key, plan.gather],
            amounts.sent_W,
            amounts.received_W,
            amounts.own_slots_W,
            amounts.own_active_W,
            amounts.fetched_slots_W,
            amounts.fetched_active_W,
            schedule.replicas,
            schedule.members,
        )


class _Amounts(NamedTuple):
    rows_WW: IntArray
    sent_W: IntArray
    received_W: IntArray
    own_slots_W: IntArray
    own_active_W: IntArray
    fetched_slots_W: IntArray
    fetched_active_W: IntArray


def _sliced(schedule: Schedule) -> _Amounts:
    """Where experts are fewer than ranks, so that nothing is large."""
    own_WE, fetched_WE = schedule.own_slots_WE, schedule.fetched_slots_WE
    rows_WW = schedule.rows_WW
    own = own_WE.sum(1), (own_WE > 0).sum(1)
    return _Amounts(rows_WW, rows_WW.sum(1), rows_WW.sum(0), *own, fetched_WE.sum(1), (fetched_WE > 0).sum(1))


def _whole(schedule: Schedule) -> _Amounts:
    """Where a rank is a block: looks at the columns of fetched experts alone."""
    workload, layout = schedule.workload, schedule.workload.layout
    block_E, rows_WB = layout.block_of_expert, workload.rows_WB
    total_E = workload.counts_WE.sum(0)
    fetched_slots_W = fetched_active_W = np.zeros(layout.ranks, dtype=np.int64)
    if schedule.plan.fetched:
        columns, everybody = np.array(schedule.plan.fetched), slice(None)
        fetches_WN = schedule.fetches(everybody, columns)
        fetched_WN = workload.counts_WE[:, columns] * fetches_WN
        fetched_slots_W, fetched_active_W = fetched_WN.sum(1), np.count_nonzero(fetches_WN, axis=1)
        total_E[columns] -= fetched_WN.sum(0)
        blocks = np.unique(block_E[columns])
        if len(blocks) == layout.blocks:
            rows_WB = schedule.block_rows(everybody, everybody)
        else:
            rows_WB = rows_WB.copy()
            rows_WB[:, blocks] = schedule.block_rows(everybody, blocks)
    own_slots_W = np.bincount(block_E, weights=total_E, minlength=layout.ranks).astype(np.int64)
    own_active_W = np.bincount(block_E, weights=total_E > 0, minlength=layout.ranks).astype(np.int64)
    sums = rows_WB.sum(1), rows_WB.sum(0)
    return _Amounts(rows_WB, *sums, own_slots_W, own_active_W, fetched_slots_W, fetched_active_W)


def _there_and_back(rows_WW: IntArray, exchange: str, places: Places) -> tuple[tuple[Flow, ...], tuple[Flow, ...]]:
    if np.trace(rows_WW) == rows_WW.sum():
        return (), ()  # exchanges without anything are left out
    there = _rows_flow(rows_WW, exchange, places)
    if exchange == "direct":
        return there, tuple(flow.back() for flow in there)
    return there, _rows_flow(rows_WW.T, exchange, places)


def _rows_flow(rows_WW: IntArray, exchange: str, places: Places) -> tuple[Flow, ...]:
    if exchange == "hierarchical":
        return _hierarchical(rows_WW, places)
    own_W = np.diagonal(rows_WW)
    out_W, in_W = rows_WW.sum(1) - own_W, rows_WW.sum(0) - own_W
    inside_out_W, inside_in_W = _inside(rows_WW, places)
    inside_out_W, inside_in_W = inside_out_W - own_W, inside_in_W - own_W
    return (
        Flow(
            np.stack([inside_out_W, out_W - inside_out_W]).astype(float),
            np.stack([inside_in_W, in_W - inside_in_W]).astype(float),
            (int(places.peers_CW[0].max()), int(places.peers_CW[1].max())),
        ),
    )


def _inside(rows_WW: IntArray, places: Places) -> tuple[IntArray, IntArray]:
    """``[W]`` rows sent to, and received from, ranks on the same host."""
    if places.hosts == 1:
        return rows_WW.sum(1), rows_WW.sum(0)
    out_W, in_W = np.zeros(len(rows_WW), dtype=np.int64), np.zeros(len(rows_WW), dtype=np.int64)
    for ranks in places.spans or [np.flatnonzero(places.host_W == host) for host in range(places.hosts)]:
        block = rows_WW[ranks, ranks] if isinstance(ranks, slice) else rows_WW[np.ix_(ranks, ranks)]
        out_W[ranks], in_W[ranks] = block.sum(1), block.sum(0)
    return out_W, in_W


def _hierarchical(rows_WW: IntArray, places: Places) -> tuple[Flow, ...]:
    """Two legs: between the ranks of each host by place, then between the hosts."""
    order = np.argsort(places.host_W, kind="stable")
    if places.spans is None:
        rows_WW = rows_WW[np.ix_(order, order)]
    ranks = len(rows_WW)
    each = ranks // places.hosts
    rows_HLHL = rows_WW.reshape(places.hosts, each, places.hosts, each)
    first_HLL, second_HHL = rows_HLHL.sum(2), rows_HLHL.sum(1)
    kept_HL = np.einsum("hll->hl", first_HLL)
    stays_HL = np.einsum("hhl->hl", second_HHL)
    back = np.empty(ranks, dtype=np.int64)
    back[order] = np.arange(ranks)

    def flow(class_: int, out_HL: IntArray, in_HL: IntArray, messages: tuple[int, int], passed: FloatArray) -> Flow:
        both = np.zeros((2, 2, ranks))
        both[0, class_], both[1, class_] = out_HL.reshape(-1)[back], in_HL.reshape(-1)[back]
        return Flow(both[0], both[1], messages, passed)

    passed_W = first_HLL.sum(1).reshape(-1)[back].astype(float)
    return (
        flow(0, first_HLL.sum(2) - kept_HL, first_HLL.sum(1) - kept_HL, (each - 1, 0), passed_W),
        flow(1, second_HHL.sum(1) - stays_HL, second_HHL.sum(0) - stays_HL, (0, places.hosts - 1), np.zeros(ranks)),
    )


def _needed(schedule: Schedule) -> Iterator[tuple[Parts, BoolArray]]:
    """(parts ``[n]``, receivers ``[W, n]``) of all that travels, some at a time."""
    layout = schedule.workload.layout
    experts = np.arange(layout.num_experts) if schedule.members > 1 else np.array(schedule.plan.fetched, dtype=np.int64)
    together = max(1, _TOGETHER // layout.slices)
    for first in range(0, len(experts), together):
        some = experts[first : first + together]
        parts = schedule.parts(np.repeat(some, layout.slices), np.tile(np.arange(layout.slices), len(some)))
        yield parts, schedule.receivers(parts.expert_N, parts.slice_N)


def _weight_flows(schedule: Schedule, places: Places) -> list[Flow]:
    """The phases of the gather, as ``Schedule.gather``."""
    sums = np.zeros((2, 2, 2, schedule.workload.layout.ranks))  # [phase, out or in, class, rank]
    for parts, receives_WN in _needed(schedule):
        _add_parcels(sums, parts, receives_WN, schedule.most_relays, places)
    messages = (int(places.peers_CW[0].max()), int(places.peers_CW[1].max()))
    flows = [Flow(sums[phase, 0], sums[phase, 1], messages) for phase in range(2)]
    return [flow for flow in flows if flow.out_CW.any()]


def _add_parcels(sums: FloatArray, parts: Parts, receives_WN: BoolArray, most: int, places: Places) -> None:
    """Add what some parts' owners send, and what is passed on of it."""
    host_W, owner_N, receivers_N = places.host_W, parts.owner_N, receives_WN.sum(0)
    gets_WN, pieces_N = receives_WN, np.ones_like(receivers_N)
    if most > 1:
        pieces_N, passes_WN = relays(receives_WN, most, parts.turn_N)
        gets_WN = np.where(pieces_N > 1, passes_WN, receives_WN)
    # Whole numbers: their sums are exact in whatever order they are taken, so the same on every kind of processor.
    piece_N = (-(-parts.elements_N // pieces_N)).astype(float)
    near_WN = gets_WN & (host_W[:, None] == host_W[owner_N])
    near_N, all_N = near_WN.sum(0), gets_WN.sum(0)
    for class_, share_WN, share_N in ((0, near_WN, near_N), (1, gets_WN & ~near_WN, all_N - near_N)):
        sums[0, 0, class_] += np.bincount(owner_N, weights=share_N * piece_N, minlength=sums.shape[-1])
        sums[0, 1, class_] += _weighted(share_WN, piece_N)
    order = np.flatnonzero(pieces_N > 1)
    if not len(order):
        return
    takes_WN, passes_WN, piece_N, pieces_N = receives_WN[:, order], passes_WN[:, order], piece_N[order], pieces_N[order]
    takers_HN, relays_HN = (_by_host(each_WN, places) for each_WN in (takes_WN, passes_WN))
    # A relay sends its piece to each other receiver; a receiver gets those of all relays but itself.
    near_out_WN = np.where(passes_WN, takers_HN[host_W] - 1, 0)
    out_WN = np.where(passes_WN, receivers_N[order] - 1, 0)
    near_in_WN = np.where(takes_WN, relays_HN[host_W] - passes_WN, 0)
    in_WN = np.where(takes_WN, pieces_N - passes_WN, 0)
    sums[1, 0, 0] += near_out_WN @ piece_N
    sums[1, 0, 1] += (out_WN - near_out_WN) @ piece_N
    sums[1, 1, 0] += near_in_WN @ piece_N
    sums[1, 1, 1] += (in_WN - near_in_WN) @ piece_N


def _weighted(chosen_WN: BoolArray, piece_N: FloatArray) -> FloatArray:
    """``[W]``: the pieces of each rank together; nearly always they are equally large."""
    if (piece_N == piece_N[:1]).all():
        equal = float(piece_N[0]) if len(piece_N) else 0.0
        return np.asarray(np.count_nonzero(chosen_WN, axis=1) * equal)
    return np.asarray(chosen_WN @ piece_N)


def _by_host(chosen_WN: BoolArray, places: Places) -> IntArray:
    """``[H, n]``: how many of each host's ranks."""
    sums_HN = np.zeros((places.hosts, chosen_WN.shape[1]), dtype=np.int64)
    np.add.at(sums_HN, places.host_W, chosen_WN)
    return sums_HN
