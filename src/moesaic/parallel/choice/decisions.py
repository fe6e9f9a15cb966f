"""What was chosen for each step, to be read, recorded and replayed."""

from __future__ import annotations

import gc
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from moesaic.errors import UsageError
from moesaic.parallel.plan import Plan

if TYPE_CHECKING:
    from moesaic.parallel.choice.chooser import Chooser
    from moesaic.parallel.choice.signature import StepSignature


@dataclass(frozen=True)
class Expected:
    """What is known about one candidate's time for one step.

    Attributes:
        plan: as one line.
        seconds: expected for the step, backward included.
        samples: timings of this very kind of step that the figure rests on; 0 where it comes from elsewhere.
        source: ``"measured"`` (this kind of step), ``"tried"`` (the same, a time or two), ``"corrected"``
            (the cost model, corrected by what similar plans took for other kinds), or ``"predicted"`` (the cost model).
    """

    plan: str
    seconds: float
    samples: int
    source: str

    def __str__(self) -> str:
        origin = "" if self.source == "measured" else f", {self.source}"
        return f"{self.plan} {self.seconds * 1e3:.3g} ms{origin}"


@dataclass(frozen=True)
class Decision:
    """How one step is carried out, the same on all ranks.

    Attributes:
        plan: what is done.
        why: ``"fixed"`` (the user's wish leaves nothing to choose), ``"predicted"`` (by the cost model), ``"measured"``
            (by timings), ``"exploring"`` (to time this candidate), or ``"replayed"``.
        signature: the kind of step.
        estimates: the candidates, the fastest first.
        number: of the decision among its chooser's, by which timings are reported.
        layers: whose chooser it is, where :func:`explain` says it.
    """

    plan: Plan
    why: str
    signature: StepSignature
    estimates: tuple[Expected, ...]
    number: int
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: the plan, why, the three fastest candidates, the kind of step, the layers where they are known."""
        told = f"{self.plan} [{self.why}]"
        if self.estimates:
            told += ": " + "; ".join(map(str, self.estimates[:3]))
        return f"{told} | {self.signature}" + (f" | {_listed(self.layers)}" if self.layers else "")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"


class _Process:
    choosers: ClassVar[list[weakref.ref[Chooser]]] = []
    layers: ClassVar[weakref.WeakKeyDictionary[Chooser, tuple[str, ...]]] = weakref.WeakKeyDictionary()
    log: list[Decision] | None = None
    replayed: Iterator[Plan] | None = None
    told = 0
    number = 0


def replaying() -> int:
    """A number that stands for the plans that are replayed; 0 where none are."""
    return _Process.number


def introduce(chooser: Chooser) -> None:
    """Let :func:`explain` know a chooser, as long as it lives."""
    _Process.choosers = [each for each in _Process.choosers if each() is not None]
    _Process.choosers.append(weakref.ref(chooser))


def name_layer(chooser: Chooser, name: str) -> None:
    """Let :func:`explain` say that this layer is among those that a chooser chooses for."""
    _Process.layers[chooser] = (*_Process.layers.get(chooser, ()), name)


def passed(decision: Decision) -> Decision:
    """A decision on its way to the executor: recorded, or replaced by the next one that is replayed.

    Raises:
        UsageError: at the step that follows the last plan.
    """
    if _Process.replayed is not None:
        plan = next(_Process.replayed, None)
        if plan is None:
            raise UsageError(f"there are more steps than the {_Process.told} plans that are replayed")
        decision = replace(decision, plan=plan, why="replayed")
    if _Process.log is not None:
        _Process.log.append(decision)
    return decision


@contextmanager
def record() -> Iterator[list[Decision]]:
    """Collect the decisions for all steps of all parallelized layers in a block, in their order; their plans can be
    replayed."""
    before, _Process.log = _Process.log, []
    try:
        yield _Process.log
    finally:
        _Process.log = before


@contextmanager
def replay(plans: Sequence[Plan]) -> Iterator[None]:
    """Carry out the steps of all parallelized layers in a block by these plans, one after the other; on all ranks.

    With the plans that :func:`record` saw and the same input, every rank sends and computes the same again.

    Raises:
        UsageError: at the step that follows the last plan.
    """
    before = _Process.replayed, _Process.told, _Process.number
    _Process.replayed, _Process.told = iter(plans), len(plans)
    _Process.number = zlib.crc32(repr(list(plans)).encode()) or 1
    try:
        yield
    finally:
        _Process.replayed, _Process.told, _Process.number = before


def explain() -> list[Decision]:
    """What ``"auto"`` would do now for every kind of step that was met by layers that are there, with the estimates
    that it rests on; the kinds of each chooser (layers of one shape share one) last met last."""
    gc.collect()  # parallelized models are in reference cycles: those that are gone would be there still
    told = []
    for each in _Process.choosers:
        if (chooser := each()) is not None:
            layers = _Process.layers.get(chooser, ())
            told += [replace(decision, layers=layers) for decision in chooser.decisions()]
    return told
