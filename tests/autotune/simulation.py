"""A machine in which nothing is computed: backends that only let a clock run, and calls that only have shapes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.autotune.memory import Memory
from moesaic.autotune.prior import costs
from moesaic.autotune.signature import Signature
from moesaic.autotune.tuner import Tuner
from moesaic.experts import ACTIVATIONS, Backend, Choice, ExpertWeights
from moesaic.registry import Registry

E, D, F, K = 64, 2048, 1024, 8
# Seconds of a call of so many rows on so many experts.
Truth = Callable[[int, int], float]


@dataclass
class Call:
    """What the tuner reads of a dispatch."""

    counts: Tensor
    permutation: Tensor
    weights: Tensor
    active: int

    @property
    def rows(self) -> int:
        return self.permutation.shape[0]

    @staticmethod
    def of(counts: list[int]) -> Call:
        rows = torch.zeros(1, dtype=torch.int64).expand(sum(counts))
        return Call(torch.tensor(counts), rows, torch.zeros(1, 1), sum(count > 0 for count in counts))


class Simulated(Backend):
    """Takes the time that ``truth`` says, times ``noise()``."""

    def __init__(self, machine: Machine, name: str, truth: Truth, preference: int) -> None:
        self.machine, self.name, self.truth, self.preference = machine, name, truth, preference
        self.calls = 0
        self.error: Exception | None = None
        self.reason: str | None = None

    def refusal(self, x_TD: Tensor, weights: ExpertWeights) -> str | None:
        return self.reason

    def run(self, x_TD: Tensor, dispatch: Any, weights: ExpertWeights) -> Tensor:
        self.calls += 1
        self.machine.now += self.truth(dispatch.rows, dispatch.active) * self.machine.noise()
        if self.error is not None:
            raise self.error
        return x_TD


@dataclass
class Machine:
    """The clock, the backends, and a tuner that knows nothing else. Thinking takes no time here."""

    now: float = 0.0
    noise: Callable[[], float] = lambda: 1.0
    backends: Registry[Backend] = field(default_factory=lambda: Registry("backend"))
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        # Neither holds memory: all elements of the one are one element, the other has none.
        self.weights = ExpertWeights(
            torch.empty(E, 2 * F, D, dtype=self.dtype, device="meta"),
            torch.empty(E, D, F, dtype=self.dtype, device="meta"),
            ACTIVATIONS.get("swiglu"),
        )
        self.tuner = Tuner(self.backends, clock=lambda: self.now)

    def add(self, name: str, truth: Truth, preference: int = 0) -> Simulated:
        made = Simulated(self, name, truth, preference)
        self.backends.register(name)(made)
        return made

    def remember(self, folder: Path) -> None:
        """Give the tuner a memory, as the process's own one has."""

        def expected(signature: Signature, backend: str) -> float:
            cost = costs(signature.family, self.backends)[backend]
            return cost.seconds(signature.typical_rows(), signature.typical_active())

        self.tuner = Tuner(self.backends, lambda: Memory(folder, {}, expected), clock=lambda: self.now)

    def call(self, counts: list[int], x_TD: Tensor | None = None) -> Choice:
        if x_TD is None:
            x_TD = torch.zeros(1, 1, dtype=self.dtype).expand(sum(counts), D)
        return self.tuner.run(x_TD, Call.of(counts), self.weights)[1]  # type: ignore[arg-type]

    def settled(self, counts: list[int]) -> Choice:
        """What is chosen where nothing is explored."""
        return next(choice for choice in iter(lambda: self.call(counts), None) if choice.why != "exploring")

    def best(self, counts: list[int]) -> float:
        """Seconds of the fastest backend for a call, without noise."""
        call = Call.of(counts)
        parts: Any = self.backends.parts()
        return min(part.truth(call.rows, call.active) for part in parts)


def line(base: float, expert: float, row: float) -> Truth:
    """Seconds that grow with the experts and the rows."""
    return lambda rows, active: base + active * expert + rows * row


def trace(calls: int, seed: int = 0) -> Iterator[list[int]]:
    """Counts of calls of 1 to 4096 tokens, alike often by their logarithm, balanced to all on one hot expert."""
    draw = random.Random(seed)
    for _ in range(calls):
        rows = K * round(math.exp(draw.uniform(0, math.log(4096))))
        kind = draw.randrange(3)
        counts = [0] * E
        if kind == 2:
            counts[draw.randrange(E)] = rows
        else:
            hot = rows // 2 + 1 if kind == 1 else 0
            counts[draw.randrange(E)] += hot
            for _ in range(min(rows - hot, E)):
                counts[draw.randrange(E)] += (rows - hot) // min(rows - hot, E)
        yield counts
