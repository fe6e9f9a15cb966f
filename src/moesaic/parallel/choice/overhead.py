"""What a step takes beside messages, computing and copies: Python, threads that wake up, ranks that wait in turn.

W ranks · T tokens of a rank.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch

from moesaic.experts import ACTIVATIONS, ExpertWeights
from moesaic.parallel.choice import compute, links
from moesaic.parallel.choice.candidates import Candidate
from moesaic.parallel.choice.compute import Overhead
from moesaic.parallel.choice.cost import estimate
from moesaic.parallel.choice.fixed import FixedChooser
from moesaic.parallel.choice.volume import Places
from moesaic.parallel.experts import ParallelExperts
from moesaic.parallel.groups import kept
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.sharding import expert_form
from moesaic.parallel.topology import Topology

# A layer so narrow that it is nearly all overhead; rows from each rank to each; chunks of the two kinds of steps.
_D_MODEL, _D_FF, _ROWS, _CHUNKS = 16, 16, 8, (1, 4)
_WARM_UP, _TURNS = 3, 9


def measure(topology: Topology) -> Overhead:
    """Carry out tiny steps, in one chunk and in several, and see what the cost model leaves unexplained; a collective
    call of some tenths of a second, the first time. All ranks get the same.
    """
    return Overhead() if topology.size == 1 else kept(("overhead", topology), lambda: _measure(topology))


def _measure(topology: Topology) -> Overhead:
    tiny = _Tiny(topology)
    steps = {chunks: [tiny.step(chunks) for _ in range(_WARM_UP + _TURNS)][_WARM_UP:] for chunks in _CHUNKS}
    tiny.step(1)  # tells the times of the one before
    found = {chunks: [tiny.seconds(*each) for each in told] for chunks, told in steps.items()}
    few, many = _CHUNKS
    # What is not explained is of two passes; ranks that share cores wait for each other in it too.
    once_few, once_many = (
        (median(inner for inner, _ in found[chunks]) - tiny.explained(chunks)) / (2 * tiny.crowd) for chunks in _CHUNKS
    )
    chunk = max(0.0, once_many - once_few) / (many - few)
    counts = median(whole - inner for inner, whole in found[few])
    mine = [max(0.0, once_few - few * chunk), chunk, max(0.0, counts)]
    return Overhead(*links.agreed(mine, topology)[0].tolist())


class _Tiny:
    """One rank of such a layer; each rank owns one expert, and has as many rows for every one.

    Attributes:
        crowd: how many times as long as alone ranks take that share cores.
    """

    def __init__(self, topology: Topology) -> None:
        layout = ExpertLayout(topology.size, _D_FF, topology.size)
        own = ExpertWeights(
            torch.zeros(1, 2 * _D_FF, _D_MODEL, device=topology.device),
            torch.zeros(1, _D_MODEL, _D_FF, device=topology.device),
            ACTIVATIONS.get("swiglu"),
        )
        form = expert_form(own)
        self._topology = topology
        self._chooser = FixedChooser(links.measure(topology), compute.measure(own, layout, topology), topology)
        self._experts = ParallelExperts(form, layout, topology, self._chooser, name="calibration")
        stored = own.tensors()
        self._tensors = {each.name: each.canonical(stored[each.name]).requires_grad_() for each in form.fields}
        tokens = _ROWS * topology.size
        self._x_TD = torch.zeros(tokens, _D_MODEL, device=topology.device, requires_grad=True)
        self._weights_T1 = torch.ones(tokens, 1, device=topology.device)
        self._ids_T1 = (torch.arange(tokens, device=topology.device) % topology.size)[:, None]
        self.crowd = self._chooser.compute.makespan(np.ones(topology.size), Places.of(topology.machines))

    def step(self, chunks: int) -> tuple[int, float]:
        """Forward and backward; its number and this rank's seconds for all of it."""
        self._chooser.rule = Candidate("tokens", overlap=chunks)
        links.agreed([0.0], self._topology)  # all ranks begin together
        start = time.perf_counter()
        with torch.enable_grad():
            y_TD = self._experts(self._x_TD, self._ids_T1, self._weights_T1, self._tensors)
            torch.autograd.grad(y_TD.sum(), [self._x_TD, *self._tensors.values()])
        if self._topology.device != "cpu":
            torch.accelerator.synchronize()
        decision = self._experts.last_decision
        assert decision is not None
        return decision.number, time.perf_counter() - start

    def seconds(self, number: int, whole: float) -> tuple[float, float]:
        """The slowest rank's, as ranks time steps, and with the counts exchange; the same where they do not."""
        longest = float(links.agreed([whole], self._topology).max())
        return self._chooser.seconds.get(number, longest), longest

    def explained(self, chunks: int) -> float:
        """What the cost model knows of the step."""
        workload = self._chooser.workload
        plan = Candidate("tokens", overlap=chunks).plan(workload)
        return estimate(plan, workload, self._chooser.links, self._chooser.compute, self._topology).seconds
