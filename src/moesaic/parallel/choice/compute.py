"""How long a rank computes: on its experts, and to bring rows into order.

W ranks · H hosts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic import hardware
from moesaic.autotune.prior import Cost
from moesaic.dispatch import Dispatch
from moesaic.experts import ExpertWeights, compute_and_tell
from moesaic.parallel.choice.links import agreed
from moesaic.parallel.choice.volume import FloatArray, Places
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray

# A calibration's rows on one expert: few, and more until one call takes so many seconds.
_FEW, _MOST, _LONG = 8, 4096, 0.008
_TURNS = 3
_COPIED = 1 << 22


@dataclass(frozen=True)
class Overhead:
    """Seconds on one rank that has the machine to itself, beside all that grows with the work: Python, mostly.

    Attributes:
        step: of one pass. chunk: of each of its chunks.
        counts: of the counts exchange, which is before every plan, as long as it takes with all ranks at work.
    """

    step: float = 0.0
    chunk: float = 0.0
    counts: float = 0.0


@dataclass(frozen=True)
class Compute:
    """Seconds on one rank that has the machine to itself.

    Attributes:
        forward, backward: of whole experts; a slice of their hidden width takes that share of what rows and experts
            take.
        copy: seconds a byte of rows or weights that is copied.
        overhead: of each pass.
        lanes: ranks of one machine that compute at full speed at the same time: its cores over the threads of a rank. 0
            where every rank has a device of its own.
    """

    forward: Cost
    backward: Cost
    copy: float
    overhead: Overhead = Overhead()
    lanes: float = 0.0

    def work(self, cost: Cost, slots_W: IntArray, active_W: IntArray, share: float, chunks: int) -> FloatArray:
        """``[W]`` seconds for one of so many chunks of the slots."""
        slots = slots_W / chunks
        active = (slots > 0) * (active_W if chunks == 1 else active_W.clip(max=slots.clip(min=1)))
        seconds_W: FloatArray = (slots > 0) * cost.base + share * (active * cost.per_expert + slots * cost.per_row)
        return seconds_W

    def makespan(self, work_W: FloatArray, machines: Places) -> float:
        """Seconds until the last rank has done its work, where ranks of a machine share its cores."""
        longest = float(work_W.max())
        if not self.lanes:
            return longest
        return max(longest, float(machines.by_host(work_W).max()) / self.lanes)


def measure(
    weights: ExpertWeights | None, layout: ExpertLayout, topology: Topology, overhead: Overhead | None = None
) -> Compute:
    """Time a rank's own experts, forward and backward, by the backends that the tuner chooses; a collective call.

    All ranks compute at once, so that cores and memory that they share are shared; the slowest rank's time counts. A
    tenth of a second or two.

    Args:
        weights: this rank's part of the experts; None where it owns none.
        overhead: passed on; none by default.
    """
    cores = hardware.cpu().cores / torch.get_num_threads() if topology.device == "cpu" else 0.0
    sizes = [0, 0] if weights is None else [weights.num_experts, weights.d_ff]
    told = agreed([cores, *sizes], topology)
    lanes, (experts, width) = float(told[:, 0].min()), told[:, 1:].max(0).astype(int).tolist()
    crowd = max(1.0, float(np.bincount(topology.machines).max()) / lanes) if lanes else 1.0
    calls = _Calls(weights, experts, topology)
    share = layout.d_ff / max(1, width)
    forward, whole = (calls.cost(grad).times(1 / crowd) for grad in (False, True))
    backward = Cost(*(max(0.0, both - one) for both, one in zip(_terms(whole), _terms(forward), strict=True)))
    whole_width = (_widened(forward, share), _widened(backward, share))
    return Compute(*whole_width, calls.copy() / crowd, overhead or Overhead(), lanes)


def _terms(cost: Cost) -> tuple[float, float, float]:
    return cost.base, cost.per_expert, cost.per_row


def _widened(cost: Cost, share: float) -> Cost:
    """Of whole experts, from that of a slice."""
    return Cost(cost.base, cost.per_expert * share, cost.per_row * share)


class _Calls:
    """Calibrating calls on one rank; a rank without experts waits for the others."""

    def __init__(self, weights: ExpertWeights | None, experts: int, topology: Topology) -> None:
        self._weights = weights if weights is not None and weights.num_experts and weights.d_ff else None
        self._experts, self._topology = experts, topology

    def cost(self, grad: bool) -> Cost:
        """Three times make three terms: few rows on one expert, as many on each, many rows on one."""
        one = self._seconds(_FEW, 1, grad)
        rows, many = _FEW, one
        while rows == _FEW or (rows < _MOST and many < _LONG):
            rows *= 4
            many = self._seconds(rows, 1, grad)
        per_row = max(0.0, many - one) / (rows - _FEW)
        per_expert = 0.0
        if self._experts > 1:
            per_expert = (self._seconds(_FEW, self._experts, grad) - one) / (self._experts - 1) - _FEW * per_row
        per_expert = max(0.0, per_expert)
        return Cost(max(0.0, one - per_expert - _FEW * per_row), per_expert, per_row)

    def copy(self) -> float:
        """Seconds a byte of gathering rows."""
        rows_ND = torch.zeros(_COPIED // 1024, 256, device=self._topology.device)
        order_N = torch.randperm(len(rows_ND), device=rows_ND.device, generator=_dice(rows_ND.device))
        return self._slowest(lambda: rows_ND[order_N]) / _COPIED

    def _seconds(self, rows: int, experts: int, grad: bool) -> float:
        """Of ``rows`` rows on each of so many experts."""
        weights = self._weights
        if weights is None:
            return self._slowest(None)
        experts = min(experts, weights.num_experts)
        ids_N1 = torch.arange(experts, device=weights.up.device).repeat(rows)[:, None]
        up = weights.up
        shape = rows * experts, weights.d_model
        x_ND = torch.randn(shape, device=up.device, dtype=up.dtype, generator=_dice(up.device))
        scale_N1 = torch.ones(rows * experts, 1, device=weights.up.device)
        return self._slowest(functools.partial(_call, weights, x_ND, ids_N1, scale_N1, grad))

    def _slowest(self, work: Callable[[], object] | None) -> float:
        """What the slowest rank takes, in the middle one of a few turns."""
        seconds = []
        for _ in range(1 + _TURNS):
            agreed([0.0], self._topology)  # all ranks begin together
            start = time.perf_counter()
            if work is not None:
                work()
                if self._topology.device != "cpu":
                    torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
        return float(np.sort(agreed(seconds[1:], self._topology).max(0))[_TURNS // 2])


def _dice(device: torch.device) -> torch.Generator:
    """Of one's own: when something is measured must not show in the numbers that a model draws."""
    return torch.Generator(device).manual_seed(0)


def _call(weights: ExpertWeights, x_ND: Tensor, ids_N1: Tensor, scale_N1: Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        x_ND = x_ND.detach().requires_grad_(grad)
        leaves: dict[str, Any] = {n: each.detach().requires_grad_(grad) for n, each in weights.tensors().items()}
        held = replace(weights, **leaves)
        y_ND, _ = compute_and_tell(x_ND, Dispatch.from_slots(ids_N1, scale_N1, weights.num_experts), held)
        if grad:
            torch.autograd.grad(y_ND.sum(), [x_ND, *leaves.values()])
