"""What candidates took for one kind of step, and what that says about others.

A timing counts as its ratio to what the cost model expected of that very step: it takes out how the steps of one kind
differ in size.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from moesaic.autotune.timings import ENOUGH, KEPT, Samples
from moesaic.parallel.choice.candidates import Candidate
from moesaic.parallel.choice.cost import PlanEstimate
from moesaic.parallel.choice.decisions import Expected
from moesaic.parallel.choice.signature import StepSignature

# Candidates of a kind, and how much slower than the best one of them may seem: by a prediction that nothing has
# corrected yet, by a corrected one, by a timing or two (the first one has all that is done once in it), by enough.
MOST_CANDIDATES = 10
_DOUBT = {"predicted": 2.0, "corrected": 1.4, "tried": 1.6, "measured": 1.1}
# Seconds that exploring a kind may lose: so many times the best step, and that share of all its steps.
_FREE_STEPS, _SHARE = 16.0, 0.01
# A candidate takes the place of the best only if it is faster by this much, so that noise does not swap two equals.
_MARGIN = 0.98
# After so many steps of a kind a candidate that was close, and timed as often as timings are kept, is timed once more.
_AGAIN = 200
# A candidate whose timings never come (a backward pass that is never run) is left alone after so many tries.
_TRIES = 2 * ENOUGH
_REMEMBERED = 64
# For so many steps it is taken for granted what other kinds say of candidates that were not timed: to ask them all
# again at each step would take longer than a plan's choice may.
_GRANTED = 32


@dataclass
class Tried:
    """A candidate of one kind of step.

    Attributes:
        predicted: for the step by which the kind was met.
        label: the plan predicted, as one line.
        picked: how often it was carried out.
        checked: the kind's steps when it was last explored.
    """

    candidate: Candidate
    predicted: PlanEstimate
    label: str
    samples: Samples = field(default_factory=Samples)
    picked: int = 0
    checked: int = 0


@dataclass(frozen=True)
class Guess:
    """A candidate's expected seconds, and where they come from: a key of the doubts."""

    tried: Tried
    seconds: float
    source: str

    @property
    def hopeful(self) -> float:
        return self.seconds / _DOUBT[self.source]

    def told(self) -> Expected:
        """For a decision."""
        return Expected(self.tried.label, self.seconds, len(self.tried.samples.ratios), self.source)


class Corrections:
    """How many times longer than predicted plans of each sort took, by the latest kinds of steps."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[object, ...], OrderedDict[StepSignature, float]] = {}

    def note(self, signature: StepSignature, candidate: Candidate, ratio: float) -> None:
        """Remember a candidate's ratio."""
        by_signature = self._ratios.setdefault(candidate.sort, OrderedDict())
        by_signature[signature] = ratio
        by_signature.move_to_end(signature)
        if len(by_signature) > _REMEMBERED:
            by_signature.popitem(last=False)

    def of(self, signature: StepSignature, candidate: Candidate) -> float | None:
        """The ratio of the nearest kind of step for plans of this sort, or None."""
        best: tuple[int, float] | None = None
        for other, ratio in self._ratios.get(candidate.sort, {}).items():
            distance = signature.distance(other)
            if distance is not None and (best is None or distance < best[0]):
                best = distance, ratio
        return None if best is None else best[1]

    def general(self, signature: StepSignature) -> float:
        """What is assumed of sorts of plans that were never timed: the least ratio of those that were.

        Another sort may be slow by itself, which says nothing about this one.
        """
        ratios = []
        for by_signature in self._ratios.values():
            for other, ratio in by_signature.items():
                if signature.distance(other) is not None:
                    ratios.append(ratio)
        return min(ratios, default=1.0)


class Kind:
    """The state of one signature."""

    def __init__(
        self, signature: StepSignature, found: list[tuple[Candidate, PlanEstimate]], corrections: Corrections
    ) -> None:
        self.signature = signature
        self.steps = 0
        self.total = self.lost = 0.0
        everyone = [Tried(candidate, predicted, str(predicted.plan)) for candidate, predicted in found]
        self._granted: dict[int, tuple[float, str]] = {}
        self._granted_at = 0
        self.tried = [guess.tried for guess in _promising(self._guesses(everyone, corrections))]
        self.best = self.tried[0]
        self._settled: list[Guess] | None = None
        self.told: tuple[Expected, ...] = ()
        self.best_seconds = 0.0

    def pick(self, corrections: Corrections, learn: bool) -> tuple[Tried, str]:
        """The candidate for the next step, and why."""
        guesses = self.compare(corrections)
        chosen, why = self.best, "measured" if self.best.samples.ratios else "predicted"
        if learn and self.steps:
            explored = self._worth_exploring(guesses)
            if explored is not None:
                chosen, why = explored, "exploring"
                explored.checked = self.steps
        self.steps += 1
        chosen.picked += 1
        return chosen, why

    def note(self, tried: Tried, ratio: float, seconds: float, best: float, corrections: Corrections) -> None:
        """Add a timing.

        Args:
            ratio: of measured to expected seconds.
            seconds: measured.
            best: what the best candidate was thought to take then.
        """
        tried.samples.note(ratio)
        self.total += seconds
        if tried is not self.best:
            self.lost += max(0.0, seconds - best)
        corrections.note(self.signature, tried.candidate, tried.samples.typical())
        self._settled = None
        if len(tried.samples.ratios) == 1:
            self._granted = {}  # the first timing says something about others of its sort

    def compare(self, corrections: Corrections) -> list[Guess]:
        """The candidates' guesses, the fastest first; takes the best of them."""
        if self._settled is None:
            guesses = self._guesses(self.tried, corrections)
            current = next(guess for guess in guesses if guess.tried is self.best)
            # What was timed gives way only to what was timed as well: a prediction is tried by exploring.
            rivals = [guess for guess in guesses if guess.tried.samples.ratios] or guesses
            if rivals[0].seconds < _MARGIN * current.seconds:
                current = rivals[0]
            self.best, self.best_seconds = current.tried, current.seconds
            self._settled = guesses
            self.told = tuple(guess.told() for guess in guesses)
        return self._settled

    def _guesses(self, tried: list[Tried], corrections: Corrections) -> list[Guess]:
        """The fastest first; equal ones in the order of the candidates."""
        if self.steps >= self._granted_at + _GRANTED:
            self._granted, self._granted_at = {}, self.steps
        guesses = []
        for each in tried:
            if each.samples.ratios:
                ratio, source = each.samples.typical(), "measured" if each.samples.trusted else "tried"
            else:
                ratio, source = self._granted.get(id(each)) or self._grant(each, corrections)
            guesses.append(Guess(each, each.predicted.seconds * ratio, source))
        return sorted(guesses, key=lambda guess: guess.seconds)

    def _grant(self, tried: Tried, corrections: Corrections) -> tuple[float, str]:
        known = corrections.of(self.signature, tried.candidate)
        told = (corrections.general(self.signature), "predicted") if known is None else (known, "corrected")
        self._granted[id(tried)] = told
        return told

    def _worth_exploring(self, guesses: list[Guess]) -> Tried | None:
        worth = [guess for guess in guesses if guess.tried is not self.best and self._is_worth(guess)]
        worth.sort(key=lambda guess: (guess.tried.picked, guess.seconds))
        for guess in worth:
            price = max(0.1 * self.best_seconds, guess.seconds - self.best_seconds)
            if self.lost + price <= _FREE_STEPS * self.best_seconds + _SHARE * self.total:
                return guess.tried
        return None

    def _is_worth(self, guess: Guess) -> bool:
        tried = guess.tried
        if guess.hopeful > self.best_seconds:
            return False
        if tried.picked >= _TRIES and not tried.samples.ratios:
            return False
        # A timing comes a step later than its try: tries count, not timings.
        return tried.picked < KEPT or self.steps - tried.checked >= _AGAIN


def _promising(guesses: list[Guess]) -> list[Guess]:
    """The fastest one, the fastest of every sort, and the next ones after them; none that seems hopeless."""
    near = [guess for guess in guesses if guess.hopeful <= guesses[0].seconds]
    first_of: dict[tuple[object, ...], Guess] = {}
    for guess in near:
        first_of.setdefault(guess.tried.candidate.sort, guess)
    chosen = list(first_of.values())[:MOST_CANDIDATES]
    taken = {id(guess) for guess in chosen}
    chosen += [guess for guess in near if id(guess) not in taken][: MOST_CANDIDATES - len(chosen)]
    return sorted(chosen, key=lambda guess: guess.seconds)
