"""A chooser that is told: it carries out one rule whatever the step, for calibrations and comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.parallel.choice.candidates import Candidate
from moesaic.parallel.choice.chooser import Chooser
from moesaic.parallel.choice.compute import Compute
from moesaic.parallel.choice.decisions import Decision
from moesaic.parallel.choice.links import Links
from moesaic.parallel.choice.signature import StepSignature
from moesaic.parallel.plan import Plan, Wish
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import Workload


class FixedChooser(Chooser):
    """Carries out :attr:`rule` and learns nothing.

    Attributes:
        rule: may be set between steps, on all ranks alike.
        workload, plan: of the last step.
        seconds: of the steps that all ranks have told of so far, the slowest rank's, both passes.
    """

    workload: Workload
    plan: Plan

    def __init__(self, links: Links, compute: Compute, topology: Topology) -> None:
        super().__init__(links, compute, topology, learn=False)
        self.rule = Candidate("tokens")
        self.seconds: dict[int, float] = {}

    def choose(self, workload: Workload, wish: Wish | None = None) -> Decision:
        """The rule's plan."""
        self.workload, self.plan = workload, self.rule.plan(workload)
        self._number += 1
        return Decision(self.plan, "fixed", StepSignature.of(workload, wish or Wish()), (), self._number)

    def report(self, number: int, forward_W: Sequence[float], backward_W: Sequence[float]) -> None:
        """Keep the time."""
        self.seconds[number] = max(forward_W) + max(backward_W)
