"""One signature's decision: its candidates, what each is thought to take, and which one computes the next call."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.autotune.prior import Cost
from moesaic.autotune.signature import Signature
from moesaic.autotune.timings import ENOUGH, KEPT, Samples, Timings
from moesaic.experts import Backend, Choice, Estimate

# A candidate that seems this many times slower than the best is not timed: by its own timings, by those of a nearby
# bucket, by the cost model at its most hopeful.
_HOPELESS = 1.6
# What an estimate from nearby, and one from the cost model, may be wrong by.
_DOUBT = {"measured": 1.0, "nearby": 1.25, "prior": 1.5}
# The least that exploring is reckoned to cost, as a share of the best candidate's time: nothing is sure before.
_RISK = 0.1
# A candidate takes the place of the best only if it is faster by this much, so that noise does not swap two equals.
_MARGIN = 0.985
# After this many calls a candidate that was close is timed once more.
_AGAIN = 1000


@dataclass(slots=True)
class Candidate:
    """A backend that can run the calls of one signature.

    Attributes:
        cost: what the model expects.
        checked: the decision's count of calls when it was last explored.
        failed: it raised an error while it was explored, so it is left alone for the rest of the process.
    """

    name: str
    backend: Backend
    cost: Cost
    samples: Samples
    checked: int = 0
    failed: bool = False


@dataclass(slots=True)
class Guess:
    """A candidate's expected seconds for one call: as they seem, at best, and at worst."""

    candidate: Candidate
    seconds: float
    hopeful: float
    fearful: float
    source: str


class Decision:
    """The state of one signature. ``due`` is the number of calls at which its candidates are compared again.

    A frozen decision never changes: bit for bit, training must not depend on when something was timed.
    """

    __slots__ = ("best", "calls", "candidates", "choice", "due", "frozen", "signature")

    def __init__(self, signature: Signature, candidates: list[Candidate], frozen: bool) -> None:
        self.signature = signature
        self.candidates = candidates
        self.frozen = frozen
        self.calls = 0
        self.due = 0
        self.best = candidates[0]
        self.choice = Choice(self.best.name, "only", signature)

    def guesses(self, rows: int, active: int, timings: Timings) -> list[Guess]:
        """What each candidate is thought to take for ``rows`` rows on ``active`` experts, the fastest first."""
        machine = _machine_factor(self.candidates, self.signature, timings)
        return sorted(
            (
                self._guess(candidate, candidate.cost.seconds(rows, active), machine, timings)
                for candidate in self.candidates
            ),
            key=lambda guess: guess.seconds,
        )

    def _guess(self, candidate: Candidate, prior: float, machine: float, timings: Timings) -> Guess:
        samples = candidate.samples
        if samples.trusted or (samples.ratios and candidate is not self.best):
            # Of equally many timings each: the lowest quarter of more of them would lie lower.
            ratio = samples.typical(ENOUGH if len(samples.ratios) < KEPT else KEPT)
            return Guess(candidate, prior * ratio, prior * ratio, prior * ratio, "measured")
        near = timings.nearby(self.signature, candidate.name)
        if near is not None:
            doubt, seconds = _DOUBT["nearby"], prior * near
            return Guess(candidate, seconds, seconds / doubt, seconds * doubt, "nearby")
        # A machine on which all else is slower than the model says may be slow, or the others may be: hope for the one,
        # fear the other.
        far = timings.anywhere(self.signature.family, candidate.name)
        # At first, what calls of quite another size took says how fast the machine is, not who is better at this size.
        doubt, ratio = _DOUBT["prior"], machine if far is None or not self.calls else far
        hopeful = min(ratio, 1.0) if far is None else ratio / doubt
        return Guess(candidate, prior * ratio, prior * hopeful, prior * max(ratio, 1.0) * doubt, "prior")

    def settle(self, guesses: list[Guess]) -> None:
        """Take the best of the guesses, unless the one in use is as good or better known."""
        usable = [guess for guess in guesses if not guess.candidate.failed] or guesses
        current = next((guess for guess in usable if guess.candidate is self.best), None)
        if current is not None and self.calls:
            # What computes is given up only for what was timed as well, or, once it is known itself, for what is
            # believed to be better even at worst: a guess alone is tried by exploring, within its budget.
            trusted = current.candidate.samples.trusted
            known = ENOUGH if trusted else 1
            usable = [
                g
                for g in usable
                if g is current or len(g.candidate.samples.ratios) >= known or (trusted and g.fearful < current.seconds)
            ]
        first = usable[0]
        if current is None or self.calls == 0 or first.seconds < _MARGIN * current.seconds:
            self.best, current = first.candidate, first
        self.choice = Choice(self.best.name, self._why(current), self.signature, estimates(guesses))

    def _why(self, best: Guess) -> str:
        if len(self.candidates) == 1:
            return "only"
        return "prior" if best.source == "prior" else "measured"

    def worth_timing(self, guesses: list[Guess]) -> list[Guess]:
        """The candidates whose next timing could change the decision, the least timed first."""
        best = next(guess for guess in guesses if guess.candidate is self.best)
        wanted = [guess for guess in guesses if guess.candidate is not self.best and self._is_worth(guess, best)]
        return sorted(wanted, key=lambda guess: (len(guess.candidate.samples.ratios), guess.seconds))

    def _is_worth(self, guess: Guess, best: Guess) -> bool:
        candidate, count = guess.candidate, len(guess.candidate.samples.ratios)
        if candidate.failed:
            return False
        if count == 1:
            return True  # the first timing may hold what happens once only, such as generating code
        if guess.hopeful > _HOPELESS * best.seconds:
            return False
        return count < ENOUGH or self.calls - candidate.checked >= _AGAIN

    def price(self, guess: Guess, guesses: list[Guess]) -> float:
        """Seconds that timing a candidate is reckoned to lose against the best one."""
        best = next(each for each in guesses if each.candidate is self.best)
        return max(_RISK * best.seconds, guess.fearful - best.seconds)


def estimates(guesses: list[Guess]) -> tuple[Estimate, ...]:
    """Guesses as a :class:`Choice` tells them."""
    return tuple(
        Estimate(guess.candidate.name, guess.seconds, len(guess.candidate.samples.ratios), guess.source)
        for guess in guesses
    )


def _machine_factor(candidates: list[Candidate], signature: Signature, timings: Timings) -> float:
    """How much slower than the model says things are here: of the candidates that were timed, the least.

    Another one may be slow by itself, which says nothing about the machine.
    """
    own = [candidate.samples.typical() for candidate in candidates if candidate.samples.ratios]
    if own:
        return min(own)
    for candidate in candidates:
        ratio = timings.nearby(signature, candidate.name) or timings.anywhere(signature.family, candidate.name)
        if ratio is not None:
            return ratio
    return 1.0
