"""What a plan should take before it has been tried: links, experts, copies, and how they overlap.

W ranks · C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moesaic.parallel.choice.compute import Compute
from moesaic.parallel.choice.links import Links
from moesaic.parallel.choice.volume import FloatArray, Flow, Places, Volume, Volumes
from moesaic.parallel.plan import Plan
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray, Workload

# Copies of a row on either side of an exchange, of an element of weights on either side, and of a chunk's gradient of
# an own expert, counted in calibrated copies (which pay for fresh memory as well): fitted to measured steps of 2 and 4
# ranks on 2 cores.
_ROW_COPIES, _WEIGHT_COPIES, _GRADIENT_COPIES = 0.5, 0.25, 1.0
PARTS = ("tokens", "results", "weights", "own", "fetched", "copies", "overhead")


@dataclass(frozen=True)
class PlanEstimate:
    """What a plan is thought to take.

    Attributes:
        forward, backward: seconds of the two passes; backward is 0 where none follows.
        parts: seconds of each of :data:`PARTS`, both passes together, as if nothing ran beside anything else; what
            overlap hides of them is the difference to :attr:`seconds`.
    """

    plan: Plan
    forward: float
    backward: float
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass
class Pricing:
    """Estimates of many plans for one workload, with what they have in common computed once."""

    workload: Workload
    links: Links
    compute: Compute
    topology: Topology
    orders: dict[int, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = Places.of(self.topology.hosts)
        self.volumes = Volumes(self.workload, self.places)
        self.machines = Places.of(self.topology.machines)

    def estimate(self, plan: Plan) -> PlanEstimate:
        """The time of a plan.

        Raises:
            ConfigError: where ``plan.replicas`` does not divide the number of slices.
        """
        volume = self.volumes.of(plan)
        parts = dict.fromkeys(PARTS, 0.0)
        forward = self._pass(plan, volume, False, parts)
        backward = self._pass(plan, volume, True, parts) if self.workload.grad else 0.0
        return PlanEstimate(plan, forward, backward, parts)

    def _pass(self, plan: Plan, volume: Volume, is_backward: bool, parts: dict[str, float]) -> float:
        workload, compute, chunks = self.workload, self.compute, plan.overlap
        row, result, item = workload.row_bytes, workload.result_bytes, workload.dtype.itemsize
        there, back = (result, row) if is_backward else (row, result)
        cost = compute.backward if is_backward else compute.forward
        own_W = compute.work(cost, volume.own_slots_W, volume.own_active_W, 1 / volume.replicas, chunks)
        fetched_W = compute.work(cost, volume.fetched_slots_W, volume.fetched_active_W, 1.0, 1)
        copies_W = self._copies(volume, there + back, is_backward, chunks)
        out = self._exchange(volume.tokens, there / chunks)
        home = self._exchange(volume.results, back / chunks)
        gathered = self._exchange(volume.weights, item)
        # In the backward pass weights travel again, and their gradients after them, the other way.
        returned = self._exchange(tuple(flow.back() for flow in volume.weights), item) if is_backward else 0.0
        own, fetched = compute.makespan(own_W, self.machines), compute.makespan(fetched_W, self.machines)
        copies = compute.makespan(copies_W, self.machines)
        overhead_W = np.full(self.topology.size, compute.overhead.step + compute.overhead.chunk * chunks)
        overhead = compute.makespan(overhead_W, self.machines)
        for name, seconds in zip(
            PARTS,
            (out * chunks, home * chunks, gathered + returned, own * chunks, fetched, copies, overhead),
            strict=True,
        ):
            parts[name] += seconds
        busy_W = own_W * chunks + fetched_W + copies_W + overhead_W
        busy_W = busy_W + self._work(volume.tokens, there, chunks) + self._work(volume.results, back, chunks)
        busy_W = busy_W + self._work(volume.weights, item * (1 + is_backward), 1)
        needed_first = volume.members > 1
        seconds = pipelined(chunks, out, own, home, gathered, fetched, returned, needed_first) + copies + overhead
        return max(seconds, compute.makespan(busy_W, self.machines) if compute.lanes else 0.0)

    def _copies(self, volume: Volume, row: int, is_backward: bool, chunks: int) -> FloatArray:
        """``[W]`` seconds of bringing rows and weights into the order in which they travel or are computed."""
        workload, item = self.workload, self.workload.dtype.itemsize
        bytes_W = _ROW_COPIES * row * (volume.sent_W + volume.received_W).astype(np.float64)
        for flow in volume.weights:
            moved_W = flow.in_CW.sum(0) + flow.out_CW.sum(0)
            bytes_W += _WEIGHT_COPIES * item * (1 + is_backward) * moved_W
        if is_backward:
            # Every chunk has gradients of all of the rank's experts, which are added up.
            own = workload.expert_elements * workload.layout.num_experts / self.topology.size
            bytes_W += _GRADIENT_COPIES * item * own * (chunks - 1)
        return bytes_W * self.compute.copy

    def _exchange(self, flows: Sequence[Flow], unit: float) -> float:
        total = 0.0
        for flow in flows:
            total += self.links.seconds(flow, unit, self.places)
            if flow.passed_W is not None:
                total += self.compute.makespan(flow.passed_W * (unit * self.compute.copy), self.machines)
        return total

    def _work(self, flows: Sequence[Flow], unit: float, chunks: int) -> FloatArray:
        work_W = np.zeros(self.topology.size)
        for flow in flows:
            work_W += self.links.work(flow, unit) + (chunks - 1) * self.links.cpu_start
        return work_W


def pipelined(
    chunks: int,
    out: float,
    own: float,
    home: float,
    gathered: float,
    fetched: float,
    returned: float,
    needed_first: bool = False,
) -> float:
    """Seconds of one pass: one exchange at a time, beside the computing, which takes one piece at a time.

    Args:
        chunks: of the rows that travel.
        out, own, home: seconds of each chunk's exchange, computing, and exchange of results.
        gathered, fetched, returned: seconds of the weights' exchange, of computing with them (while results travel),
            and of their gradients' exchange.
        needed_first: nothing is computed without the weights: slices of the own experts are among them.
    """
    arrived = [out * (index + 1) + needed_first * gathered for index in range(chunks)]
    wire = out * chunks + gathered
    weights_there = wire
    core, done = 0.0, []
    for index in range(chunks):
        core = max(core, arrived[index]) + own
        done.append(core)
    for finished in done:
        wire = max(wire, finished) + home
    if fetched:
        core = max(core, weights_there) + fetched
    if returned:
        wire = max(wire, core) + returned
    return max(wire, core)


def estimate(plan: Plan, workload: Workload, links: Links, compute: Compute, topology: Topology) -> PlanEstimate:
    """What a plan should take.

    Raises:
        ConfigError: where ``plan.replicas`` does not divide the number of slices.
    """
    return Pricing(workload, links, compute, topology).estimate(plan)
