"""Chooses a plan for every step, on every rank the same one without a word between them.

A chooser is a state machine that all ranks feed alike: with the workloads of the counts exchange and the timings that
travel in it. It reads no clock and nothing else of its own rank, and iterates over nothing whose order could differ.
Everything that is compared follows from whole numbers by single floating-point operations, so that processors of
different kinds agree as well.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.autotune.setting import is_tuning_on
from moesaic.parallel.choice.candidates import exchanges, search
from moesaic.parallel.choice.compute import Compute
from moesaic.parallel.choice.cost import PlanEstimate, Pricing
from moesaic.parallel.choice.decisions import Decision, introduce, passed
from moesaic.parallel.choice.links import Links
from moesaic.parallel.choice.signature import StepSignature
from moesaic.parallel.choice.step_timings import Corrections, Kind, Tried
from moesaic.parallel.plan import AUTO, Wish
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import Workload

# Kinds of steps that are remembered, and decisions whose timings may still come.
_MOST_KINDS, _MOST_PENDING = 2048, 4096
# Steps of a kind that are each predicted by their own numbers, while candidates are compared.
_CLOSELY = 32
_PRIME = (1 << 61) - 1


@dataclass(frozen=True)
class _Pending:
    """A decided step until its timing comes; ``best``: what the best candidate was thought to take."""

    kind: Kind
    tried: Tried
    expected: PlanEstimate
    best: float


class Chooser:
    """Chooses the plans of all layers of one shape.

    Args:
        links, compute: the same on all ranks.
        topology: of the ranks.
        learn: whether timings are taken into account and candidates explored; without, and with ``MOESAIC_TUNE=off``
            or ``torch.use_deterministic_algorithms``, the cost model alone chooses.
    """

    def __init__(self, links: Links, compute: Compute, topology: Topology, learn: bool = True) -> None:
        self.links = links
        self.compute = compute
        self.topology = topology
        self.learn = learn and topology.device == "cpu"  # steps are timed there only
        self._kinds: OrderedDict[StepSignature, Kind] = OrderedDict()
        self._pending: OrderedDict[int, _Pending] = OrderedDict()
        self._corrections = Corrections()
        self._exchanges: dict[Wish, tuple[str, ...]] = {}
        self._number = 0
        self._checksum = 0
        self._note(repr((links, compute, topology.hosts)))
        introduce(self)

    def choose(self, workload: Workload, wish: Wish | None = None) -> Decision:
        """Decide how a step is carried out.

        Raises:
            ConfigError: where the wish names an unknown exchange, or a ``replicas`` that does not divide the slices.
            UnsupportedError: where the exchange that it names cannot be used on this topology.
        """
        wish = wish or Wish()
        learn = self.learn and is_tuning_on() and not torch.are_deterministic_algorithms_enabled()
        signature = StepSignature.of(workload, wish)
        kind = self._kinds.get(signature)
        if kind is None:
            kind = self._meet(signature, workload, wish)
        self._kinds.move_to_end(signature)
        tried, why = kind.pick(self._corrections, learn)
        if len(kind.tried) == 1 and wish.strategy != AUTO:
            why = "fixed"
        plan = tried.candidate.plan(workload)
        self._number += 1
        if learn:
            is_close = 1 < kind.steps <= _CLOSELY and len(kind.tried) > 1
            expected = self._pricing(workload).estimate(plan) if is_close else tried.predicted
            self._pending[self._number] = _Pending(kind, tried, expected, kind.best_seconds)
            if len(self._pending) > _MOST_PENDING:
                self._pending.popitem(last=False)
        self._note(repr((self._number, plan)))
        return passed(Decision(plan, why, signature, kind.told, self._number))

    def report(self, number: int, forward_W: Sequence[float], backward_W: Sequence[float]) -> None:
        """Tell what a decided step took; of each pass the slowest rank's time counts.

        Args:
            number: of the decision.
            forward_W, backward_W: ``[W]``, seconds of each rank's two passes; 0 where one was not measured.
        """
        forward, backward = float(max(forward_W)), float(max(backward_W))
        self._note(repr((number, forward, backward)))
        pending = self._pending.pop(number, None)
        if pending is None or forward <= 0.0:
            return
        expected = pending.expected.forward + (pending.expected.backward if backward > 0.0 else 0.0)
        ratio = (forward + backward) / expected
        pending.kind.note(pending.tried, ratio, forward + backward, pending.best, self._corrections)

    def checksum(self) -> int:
        """A number of at most 61 bits that follows from everything that the chooser was fed and has decided: ranks
        whose numbers differ have gone apart."""
        return self._checksum

    def decisions(self) -> list[Decision]:
        """What would be done now for every kind of step that was met, for a workload like the first one of its kind;
        the kinds in the order in which they were last met."""
        told = []
        for signature, kind in self._kinds.items():
            kind.compare(self._corrections)
            why = "measured" if kind.best.samples.ratios else "predicted"
            told.append(Decision(kind.best.predicted.plan, why, signature, kind.told, 0))
        return told

    def _meet(self, signature: StepSignature, workload: Workload, wish: Wish) -> Kind:
        if wish not in self._exchanges:
            self._exchanges[wish] = exchanges(self.topology, wish)
        found = search(self._pricing(workload), wish, self._exchanges[wish])
        kind = self._kinds[signature] = Kind(signature, found, self._corrections)
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        return kind

    def _pricing(self, workload: Workload) -> Pricing:
        return Pricing(workload, self.links, self.compute, self.topology)

    def _note(self, told: str) -> None:
        self._checksum = (self._checksum * 1000003 + zlib.crc32(told.encode())) % _PRIME
