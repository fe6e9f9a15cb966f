"""How long exchanges take: seconds a message and seconds a byte, inside a host and between hosts, measured at start.

α–β model: LogP's and Hockney's two constants (Hockney: The communication challenge for MPP, Parallel Computing 1994,
section 2), one pair for each class of links.

W ranks · H hosts · C classes of links.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesaic.parallel.choice.volume import FloatArray, Flow, Places
from moesaic.parallel.groups import kept
from moesaic.parallel.topology import Topology

# Bytes that a rank sends: a message that is all latency, then larger ones until an exchange takes so many seconds.
_SMALL, _SIZES, _LONG = 64, (1 << 18, 1 << 20, 1 << 22, 1 << 24), 0.015
_SMALL_TURNS, _TURNS = 15, 5


@dataclass(frozen=True)
class Link:
    """One class of links.

    Attributes:
        alpha: seconds a message.
        beta: seconds for each byte that one rank sends or receives.
        shared: seconds for each byte that all ranks of a host send or receive together; 0 where they share nothing.
    """

    alpha: float
    beta: float
    shared: float = 0.0


@dataclass(frozen=True)
class Links:
    """All links of a topology.

    Attributes:
        inside, between: between ranks of one host, and of different hosts.
        start: seconds of an exchange beside its messages.
        cpu: core-seconds for each byte that a rank sends or receives: what communication takes from computing.
        cpu_start: core-seconds of a rank for an exchange.
    """

    inside: Link
    between: Link
    start: float = 0.0
    cpu: float = 0.0
    cpu_start: float = 0.0

    def seconds(self, flow: Flow, unit: float, places: Places) -> float:
        """Of one exchange by all ranks: the busiest rank's or host's bytes, and the messages.

        Args:
            unit: bytes of one of the flow's rows or elements.
        """
        longest = 0.0
        for class_, link in enumerate((self.inside, self.between)):
            out_W, in_W = flow.out_CW[class_], flow.in_CW[class_]
            seconds = link.beta * max(float(out_W.max()), float(in_W.max()))
            if link.shared:
                most = max(float(places.by_host(out_W).max()), float(places.by_host(in_W).max()))
                seconds = max(seconds, link.shared * most)
            longest = max(longest, seconds)
        messages_in, messages_between = flow.messages_C
        waiting = self.start + messages_in * self.inside.alpha + messages_between * self.between.alpha
        return waiting + longest * unit

    def work(self, flow: Flow, unit: float) -> FloatArray:
        """``[W]`` core-seconds that the exchange takes from each rank's processor."""
        work_W: FloatArray = self.cpu_start + self.cpu * unit * (flow.out_CW.sum(0) + flow.in_CW.sum(0))
        return work_W


def measure(topology: Topology) -> Links:
    """Measure the links by exchanges of the kind that steps use; a collective call, well under a second the first time.

    All ranks send at once, so that what they share is shared; the slowest rank's time counts, and all get the same.
    """
    if topology.size == 1:
        return Links(Link(0.0, 0.0), Link(0.0, 0.0))
    return kept(("links", topology), lambda: _of_first_rank(_Measuring(topology).links(), topology))


def _of_first_rank(links: Links, topology: Topology) -> Links:
    """The same on all ranks to the last bit: a solver may round otherwise on another kind of processor."""
    mine = [getattr(link, each.name) for link in (links.inside, links.between) for each in fields(Link)]
    told = agreed([*mine, links.start, links.cpu, links.cpu_start], topology)[0].tolist()
    return Links(Link(*told[:3]), Link(*told[3:6]), *told[6:])


class _Measuring:
    """One measurement on one rank."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._places = Places.of(topology.hosts)
        self._host_W = self._places.host_W
        self._buffer = torch.zeros(2 * _SIZES[-1] + _SMALL * topology.size, dtype=torch.uint8, device=topology.device)
        self.cpu = 0.0

    def links(self) -> Links:
        topology = self._topology
        everybody = np.full((topology.size, topology.size), _SMALL)
        small, cpu_start = self._exchange(
            topology.group, everybody[topology.rank], everybody[:, topology.rank], _SMALL_TURNS
        )
        start, alphas = self._latencies(small)
        near_WW = self._host_W[:, None] == self._host_W
        others_WW = ~np.eye(topology.size, dtype=bool)
        found = [
            self._class(near_WW & others_WW, small, alpha) if (near_WW & others_WW).any() else None
            for near_WW, alpha in ((near_WW, alphas[0]), (~near_WW, alphas[1]))
        ]
        inside, between = found[0] or found[1], found[1] or found[0]
        assert inside is not None and between is not None
        if topology.device != "cpu":  # a device's exchanges take nothing from what computes
            return Links(inside, between, start)
        return Links(inside, between, start, self.cpu, cpu_start / topology.size)

    def _latencies(self, small: float) -> tuple[float, tuple[float, float]]:
        """Seconds of an exchange beside its messages, and of a message inside a host and between hosts."""
        topology = self._topology
        peers_C = self._places.peers_CW.max(1)
        if topology.inside is None:
            # One equation: so much for each message.
            alpha = small / (topology.size - 1)
            return 0.0, (alpha, alpha)
        groups = [(topology.inside, peers_C[0]), (topology.across, self._places.hosts - 1)]
        inside, across = (
            self._exchange(group, np.full(others + 1, _SMALL), np.full(others + 1, _SMALL), _SMALL_TURNS)[0]
            for group, others in groups
        )
        # Three equations: the whole group's exchange, that of a host's ranks, and that across hosts.
        equations = np.array([[1, peers_C[0], peers_C[1]], [1, peers_C[0], 0], [1, 0, self._places.hosts - 1]])
        start, near, far = _nonnegative(equations.astype(float), np.array([small, inside, across]))
        return start, (near, far)

    def _class(self, pairs_WW: Any, small: float, alpha: float) -> Link:
        """One class of links: all its pairs of ranks at once, then one rank of each host alone."""
        peers_W = pairs_WW.sum(1)
        busy_W = peers_W > 0
        for size in _SIZES:
            bytes_WW = np.where(pairs_WW, size // np.maximum(1, peers_W)[:, None], 0)
            together = self._byte_seconds(bytes_WW, small)
            if together * size > _LONG:
                break
        most_H = self._places.by_host(bytes_WW.sum(1))
        first_W = np.zeros(len(busy_W), dtype=bool)
        for host in range(self._places.hosts):
            first_W[np.flatnonzero(busy_W & (self._host_W == host))[:1]] = True
        alone_WW = np.where(first_W[:, None] & pairs_WW, bytes_WW, 0)
        alone = self._byte_seconds(alone_WW, small)
        return Link(alpha, min(alone, together), together * size / float(most_H.max()))

    def _byte_seconds(self, bytes_WW: Any, small: float) -> float:
        """Seconds for each byte of the rank that sends most."""
        rank = self._topology.rank
        seconds, cpu = self._exchange(self._topology.group, bytes_WW[rank], bytes_WW[:, rank], _TURNS)
        self.cpu = max(self.cpu, cpu / float(2 * bytes_WW.sum()))
        return max(0.0, seconds - small) / float(bytes_WW.sum(1).max())

    def _exchange(self, group: Any, sends: Any, receives: Any, turns: int) -> tuple[float, float]:
        """Seconds of an exchange, and core-seconds of all ranks together; the same on all ranks of the mesh."""
        outgoing, incoming = self._buffer[: int(sends.sum())], torch.empty_like(self._buffer[: int(receives.sum())])
        seconds, cpu = [], []
        for _ in range(1 + turns):
            before, start = time.process_time(), time.perf_counter()
            dist.all_to_all_single(incoming, outgoing, receives.tolist(), sends.tolist(), group=group)
            if self._topology.device != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - before)
        told = agreed([*seconds[1:], *cpu[1:]], self._topology)
        slowest = np.sort(told[:, :turns].max(0))
        return float(slowest[turns // 4]), float(np.sort(told[:, turns:].sum(0))[turns // 4])


def _nonnegative(equations: FloatArray, values: FloatArray) -> list[float]:
    """The least-squares solution of few equations without its negative unknowns, one by one the most negative."""
    kept = list(range(equations.shape[1]))
    while True:
        found = np.linalg.lstsq(equations[:, kept], values, rcond=None)[0]
        if (found >= 0).all():
            break
        del kept[int(found.argmin())]
    solution = [0.0] * equations.shape[1]
    for unknown, value in zip(kept, found.tolist(), strict=True):
        solution[unknown] = value
    return solution


def agreed(values: Sequence[float], topology: Topology) -> FloatArray:
    """``[W, n]``: what every rank has measured, the same numbers on all of them; a collective call."""
    own = torch.tensor(values, dtype=torch.float64, device=topology.device)
    told = [torch.empty_like(own) for _ in range(topology.size)]
    dist.all_gather(told, own, group=topology.group)
    return np.asarray(torch.stack(told).cpu().numpy())
