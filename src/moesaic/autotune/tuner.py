"""The tuner: computes each call of ``"auto"`` with the backend that is thought to be fastest, and learns from it.

A call whose signature is known costs a look-up and two readings of the clock. Learning needs timings of the others:
now and then one of them computes a call instead of the best, which gives the same numbers, only later. What that loses
is kept under a hundredth of the time that calls take, and a candidate that is believed to be far behind is left alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.autotune.decision import Candidate, Decision, Guess
from moesaic.autotune.events import EventTimer
from moesaic.autotune.memory import Memory
from moesaic.autotune.prior import costs
from moesaic.autotune.setting import is_tuning_on
from moesaic.autotune.signature import Signature, bucket_of_rows, family_of, spread_of, wants_grad
from moesaic.autotune.timings import Timings
from moesaic.dispatch import Dispatch
from moesaic.eager import is_eager
from moesaic.errors import UsageError
from moesaic.experts import Backend, Choice, ExpertWeights
from moesaic.experts.backend import preferred
from moesaic.registry import Registry

# The share of the time of all calls that exploring, and thinking about it, may lose. Below the hundredth that is
# promised, because what an unknown candidate takes is known only afterwards.
_SHARE = 0.006
_NEVER = 1 << 62
# Where time can be told.
_TIMED = ["cpu", "cuda"]


@dataclass
class Statistics:
    """What tuning has cost in this process.

    Attributes:
        calls: computed by ``"auto"``, and timed or counted.
        seconds: that those calls took.
        explored: how many of them went to a candidate that was not thought to be the best.
        lost: seconds that exploring and comparing took beyond what the best candidate would have.
        file: where timings are remembered, or None where they are not.
        problem: why they could not be read or written, or None.
    """

    calls: int
    seconds: float
    explored: int
    lost: float
    file: str | None
    problem: str | None

    @property
    def overhead(self) -> float:
        """``lost`` as a share of what the calls would have taken without."""
        return self.lost / (self.seconds - self.lost) if self.seconds > self.lost else 0.0


class Tuner:
    """Chooses, times and remembers; one of them serves a process, from any number of threads.

    Args:
        backends: the candidates.
        remember: makes what timings of earlier processes come from and go to, when it is first needed; None, or a
            UsageError of it, to remember nothing.
        clock: seconds, for calls on a CPU.
        events: how calls on an accelerator are timed.
    """

    def __init__(
        self,
        backends: Registry[Backend],
        remember: Callable[[], Memory] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        events: EventTimer | None = None,
    ) -> None:
        self.backends = backends
        self.memory: Memory | None = None
        self.timings = Timings()
        self._remember = remember
        self._problem: str | None = None
        self._clock = clock
        self._events = events or EventTimer()
        self._lock = threading.Lock()
        self._parts: tuple[Backend, ...] = ()
        # Two tables: what is learned, and what follows from the cost model alone and never changes.
        self._learned: dict[Any, Decision] = {}
        self._stable: dict[Any, Decision] = {}
        self.seconds = self.lost = 0.0
        self.explored = 0

    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> tuple[Tensor, Choice]:
        """Compute a call, and say by which backend and why."""
        rows = dispatch.permutation.shape[0]
        if not rows or not is_eager(x_TD):  # there is nothing to time, or somebody traces or transforms the call
            return self._by_preference(x_TD, dispatch, weights)
        up = weights.up
        active, spread, hot = spread_of(dispatch.counts.tolist(), rows) if x_TD.is_cpu else (0, 0, False)
        grad = wants_grad(x_TD, dispatch, weights)
        bucket = bucket_of_rows(rows)
        # All that a family or a refusal may follow from, in forms that cost nothing to read.
        key = (
            *(bucket, spread, hot, grad, x_TD.device, x_TD.dtype, x_TD.is_contiguous(), torch.get_num_threads()),
            # Not the number of slots that adapters have: the work is that of the experts with rows.
            *(weights.base_experts or up.shape[0], up.shape[1:], up.dtype, up.stride(), weights.down.stride()),
            *(weights.transposed, weights.activation.name, weights.up_bias is None, weights.post_norm is None),
        )
        is_stable = torch.are_deterministic_algorithms_enabled() or not is_tuning_on()
        if self._parts != (parts := self.backends.parts()):
            self._forget_decisions(parts)
        decision = (self._stable if is_stable else self._learned).get(key)
        if decision is None:
            start = self._clock()
            family = family_of(x_TD, weights, grad)
            decision = self._decide(key, Signature(family, bucket, spread, hot), x_TD, weights, rows, active, is_stable)
            self._account(self._clock() - start, 0.0)
        elif decision.calls >= decision.due:
            return self._reconsider(decision, x_TD, dispatch, weights, rows, active)
        return self._run_best(decision, x_TD, dispatch, weights, rows, active)

    def _run_best(
        self, decision: Decision, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights, rows: int, active: int
    ) -> tuple[Tensor, Choice]:
        best, choice = decision.best, decision.choice
        decision.calls += 1
        if best.backend.refusal(x_TD, weights) is not None:
            return self._by_preference(x_TD, dispatch, weights)
        if decision.frozen:
            return best.backend.run(x_TD, dispatch, weights), choice
        if not x_TD.is_cpu:
            return self._run_on_device(decision, best, x_TD, dispatch, weights, rows), choice
        start = self._clock()
        y_TD = best.backend.run(x_TD, dispatch, weights)
        seconds = self._clock() - start
        cost = best.cost
        best.samples.note(seconds / (cost.base + active * cost.per_expert + rows * cost.per_row))
        self.seconds += seconds
        return y_TD, choice

    def _run_on_device(
        self,
        decision: Decision,
        candidate: Candidate,
        x_TD: Tensor,
        dispatch: Dispatch,
        weights: ExpertWeights,
        rows: int,
        expected: float | None = None,
    ) -> Tensor:
        """On an accelerator, some calls carry events that are read when they have passed; nobody waits for them.

        ``expected`` are the seconds of the best candidate where another one is explored.
        """
        cost = candidate.cost.seconds(rows, min(rows, weights.num_experts))
        if expected is None and not self._events.is_turn(decision.calls):
            self.seconds += decision.best.samples.typical() * cost if decision.best.samples.ratios else cost
            return candidate.backend.run(x_TD, dispatch, weights)

        def note(seconds: float) -> None:
            candidate.samples.note(seconds / cost)
            self._account(seconds, seconds if expected is None else expected)

        with self._events.timed(x_TD.device, note):
            return candidate.backend.run(x_TD, dispatch, weights)

    def _decide(
        self, key: Any, signature: Signature, x_TD: Tensor, weights: ExpertWeights, rows: int, active: int, stable: bool
    ) -> Decision:
        timings = Timings() if stable else self.known_timings()
        candidates = self.candidates(signature, x_TD, weights, timings)
        with self._lock:
            # Where a gradient ties this call to others, the choice must not change.
            is_frozen = stable or signature.family.grad or x_TD.device.type not in _TIMED
            decision = Decision(signature, candidates, is_frozen)
            decision.settle(decision.guesses(rows, active or min(rows, weights.num_experts), timings))
            decision.due = _NEVER if is_frozen or len(candidates) == 1 else 2
            table = self._stable if stable else self._learned
            return table.setdefault(key, decision)

    def candidates(
        self, signature: Signature, x_TD: Tensor, weights: ExpertWeights, timings: Timings | None = None
    ) -> list[Candidate]:
        """The backends that can run a call, the most preferred first.

        Raises:
            UnsupportedError: where none can.
        """
        timings = timings or self.known_timings()
        preferred(x_TD, weights, self.backends)  # raises where there is none
        backends = {name: self.backends.get(name) for name in self.backends}
        able = {name: backend for name, backend in backends.items() if backend.refusal(x_TD, weights) is None}
        model = costs(signature.family, self.backends)
        return [
            Candidate(name, able[name], model[name], timings.of(signature, name))
            for name in sorted(able, key=lambda name: -able[name].preference)
        ]

    def _reconsider(
        self, decision: Decision, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights, rows: int, active: int
    ) -> tuple[Tensor, Choice]:
        """Compare the candidates again, and let another one compute this call if that is worth its price."""
        if self._events.is_capturing(x_TD.device):
            return self._run_best(decision, x_TD, dispatch, weights, rows, active)
        start = self._clock()
        active = active or min(rows, weights.num_experts)
        with self._lock:
            guesses = decision.guesses(rows, active, self.timings)
            decision.settle(guesses)
            guess = self._affordable(decision, guesses)
            if self.memory is not None:
                self.memory.save_sometimes(self.timings)
            self._account(self._clock() - start, 0.0)
        if guess is None or guess.candidate.backend.refusal(x_TD, weights) is not None:
            return self._run_best(decision, x_TD, dispatch, weights, rows, active)
        # On average, not undisturbed: disturbances are no fault of the one that is explored.
        expected = next(each.seconds for each in guesses if each.candidate is decision.best)
        expected *= decision.best.samples.disturbance()
        return self._explore(decision, guess.candidate, expected, x_TD, dispatch, weights, rows, active)

    def _affordable(self, decision: Decision, guesses: list[Guess]) -> Guess | None:
        """The candidate to be timed now, or None; and when to think about it next."""
        calls = decision.calls
        worth = decision.worth_timing(guesses)
        prices = [(decision.price(guess, guesses), guess) for guess in worth]
        for price, guess in prices:
            if self.lost + price <= _SHARE * self.seconds:
                decision.due = calls + 2
                return guess
        if not prices:
            decision.due = calls + min(max(16, calls), 512)
            return None
        # About as many calls of this kind as pay for it; fewer, because others pay too.
        missing = (self.lost + min(price for price, _ in prices)) / _SHARE - self.seconds
        best = next(guess.seconds for guess in guesses if guess.candidate is decision.best)
        decision.due = calls + max(2, min(int(missing / best / 2), max(8, calls // 2), 512))
        return None

    def _explore(
        self,
        decision: Decision,
        candidate: Candidate,
        expected: float,
        x_TD: Tensor,
        dispatch: Dispatch,
        weights: ExpertWeights,
        rows: int,
        active: int,
    ) -> tuple[Tensor, Choice]:
        decision.calls += 1
        candidate.checked = decision.calls
        self.explored += 1
        told = decision.choice
        start = self._clock()
        try:
            if not x_TD.is_cpu:
                y_TD = self._run_on_device(decision, candidate, x_TD, dispatch, weights, rows, expected)
                return y_TD, Choice(candidate.name, "exploring", told.signature, told.estimates)
            y_TD = candidate.backend.run(x_TD, dispatch, weights)
        except Exception:
            # The caller asked for nothing but the numbers: whoever can gives them, and this one is not tried again.
            candidate.failed = True
            self._account(self._clock() - start, 0.0)
            y_TD, choice = self._run_best(decision, x_TD, dispatch, weights, rows, active)
            return y_TD, Choice(choice.backend, "failed", choice.signature, choice.estimates)
        seconds = self._clock() - start
        candidate.samples.note(seconds / candidate.cost.seconds(rows, active))
        self._account(seconds, expected)
        return y_TD, Choice(candidate.name, "exploring", told.signature, told.estimates)

    def _account(self, seconds: float, expected: float) -> None:
        """Book a call or a thought that would have taken ``expected`` without tuning; what gains pays back."""
        self.seconds += seconds
        self.lost = max(0.0, self.lost + seconds - expected)

    def _by_preference(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> tuple[Tensor, Choice]:
        name = preferred(x_TD, weights, self.backends)
        return self.backends.get(name).run(x_TD, dispatch, weights), Choice(name, "rule")

    def _known(self) -> Timings:
        if self.memory is None and self._remember is not None:
            try:
                self.memory = self._remember()
            except UsageError as error:  # the numbers that were asked for need no memory
                self._remember, self._problem = None, str(error)
            else:
                self.memory.load(self.timings)
        return self.timings

    def _forget_decisions(self, parts: tuple[Backend, ...]) -> None:
        with self._lock:
            self._parts = parts
            self._learned, self._stable = {}, {}

    def forget_choices(self) -> None:
        """Decide everything anew from the timings that there are, at the next call of each signature."""
        self._forget_decisions(self.backends.parts())

    def decisions(self) -> list[Decision]:
        """Every decision of this process that may rest on timings."""
        with self._lock:
            return list(self._learned.values())

    def known_timings(self) -> Timings:
        """What this process and those before it have timed."""
        with self._lock:
            return self._known()

    def save(self) -> None:
        """Write what was timed, where there is a memory."""
        if self.memory is not None:
            with self._lock:
                self.memory.save(self.timings)

    def statistics(self) -> Statistics:
        """What tuning has cost so far."""
        calls = sum(decision.calls for decision in self.decisions())
        file = None if self.memory is None else str(self.memory.file)
        problem = self._problem if self.memory is None else self.memory.problem
        return Statistics(calls, self.seconds, self.explored, self.lost, file, problem)

    def start_anew(self) -> None:
        """For the child of a fork: the parent writes what it timed, and a thread that held the lock is not here."""
        self._lock = threading.Lock()
        for *_, samples in self.timings:
            samples.fresh = 0
