"""The runs of a recipe as one row, its differences to what it is compared with, and whether its claims show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import numpy as np

from moesaic.bench.study.entries import Entry
from moesaic.bench.study.speed import ratio

TOLERANCE = 0.02
"""Nats per token: a loss higher by less counts as no higher."""
LESS = 0.98
"""A share of the parameters used per token, or of the time, that is small enough to be called less."""
LINE = ("softmax_top1", "softmax", "softmax_top3")
"""The baseline with more and more experts per token: what compute alone buys."""
# One-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; from then on a formula is as good.
_T = (6.31, 2.92, 2.35, 2.13, 2.02)


@dataclass(frozen=True)
class Figures:
    """What the runs of one recipe found, a value a seed.

    Attributes:
        domains: loss in nats per token, by domain; loss: the mean of the domains.
        experts, zero: per token, experts with weights and zero-computation experts; the mean of the domains.
        active: parameters that a token meets.
        training, forward: tokens per second, a value a round; empty where that was not measured.
        seeds: of the runs, in the order of the values.
    """

    domains: dict[str, list[float]]
    loss: list[float]
    experts: list[float]
    zero: list[float]
    active: list[float]
    imbalance: list[float]
    specialization: list[float]
    training: Sequence[float] = ()
    forward: Sequence[float] = ()
    seeds: Sequence[int] = ()


def figures_of(results: Sequence[Mapping[str, Any]], rates: Mapping[str, Sequence[float]] | None = None) -> Figures:
    """The row of a recipe, from what :func:`~moesaic.bench.study.runs.work` found with each seed."""
    rates = rates or {}
    names = list(results[0]["validation"])
    domains = {name: [float(result["validation"][name]["loss"]) for result in results] for name in names}
    return Figures(
        domains=domains,
        loss=[fmean(values) for values in zip(*domains.values(), strict=True)],
        experts=[fmean(result["experts"].values()) for result in results],
        zero=[fmean(result["zero"].values()) for result in results],
        active=[float(result["active_parameters"]) for result in results],
        imbalance=[float(result["imbalance"]) for result in results],
        specialization=[float(result["specialization"]) for result in results],
        training=rates.get("training", ()),
        forward=rates.get("forward", ()),
        seeds=[int(result["recipe"]["train.seed"]) for result in results],
    )


@dataclass(frozen=True)
class Noise:
    """What the differences between seeds of all recipes together say: one with three seeds says little by itself.

    Attributes:
        deviation: standard deviation of the difference that one seed gives. freedom: degrees of freedom behind it.
    """

    deviation: float = 0.0
    freedom: int = 0

    @classmethod
    def of(cls, differences: Sequence[Sequence[float]]) -> Noise:
        """From the differences of each recipe, seed by seed."""
        known = [each for each in differences if len(each) > 1]
        if not known:
            return cls()
        return cls(math.sqrt(fmean(stdev(each) ** 2 for each in known)), sum(len(each) - 1 for each in known))


def _quantile(freedom: int) -> float:
    return _T[freedom - 1] if freedom <= len(_T) else 1.645 + 1.6 / freedom


@dataclass(frozen=True)
class Difference:
    """Mean of the differences seed by seed, and how far the true one may be from it (one-sided, 95 %)."""

    mean: float
    margin: float

    @classmethod
    def of(cls, each: Sequence[float], noise: Noise | None = None) -> Difference:
        """From the differences of the seeds: by their own deviation or by that of all recipes, whichever is wider.

        Each with the quantile of its own degrees of freedom: a deviation of three seeds is itself hardly known.
        """
        noise = noise or Noise()
        own = stdev(each) if len(each) > 1 else 0.0
        known = [(d, f) for d, f in ((own, len(each) - 1), (noise.deviation, noise.freedom)) if f > 0]
        margin = max((_quantile(f) * d / math.sqrt(len(each)) for d, f in known), default=math.inf)
        return cls(fmean(each), margin)

    def verdict(self, limit: float = 0.0) -> str:
        """``yes`` where it is surely below the limit, ``no`` where it is surely above, else ``unclear``."""
        if self.mean + self.margin < limit:
            return "yes"
        return "no" if self.mean - self.margin > limit else "unclear"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.margin:.3f}".replace("-", "−")


def minus(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """One recipe beside the one that it is compared with; ``rows`` are all recipes, for the line of compute.

    ``noise`` and ``equal_noise`` are those of all recipes' differences, as they are and at equal compute.
    """

    ours: Figures
    theirs: Figures
    rows: Mapping[str, Figures]
    noise: Noise = field(default_factory=Noise)
    equal_noise: Noise = field(default_factory=Noise)

    @property
    def losses(self) -> list[float]:
        """Ours minus theirs, seed by seed."""
        return minus(self.ours.loss, self.theirs.loss)

    @property
    def losses_at_equal_compute(self) -> list[float]:
        """The same, as if both used as many parameters per token: theirs is moved along the line of softmax top-k.

        It is moved not at all where the line has not been measured.
        """
        bought = [
            self._line(seed, ours) - self._line(seed, theirs)
            for seed, (ours, theirs) in enumerate(zip(self.ours.active, self.theirs.active, strict=True))
        ]
        return minus(self.losses, bought)

    @property
    def loss(self) -> Difference:
        """Of :attr:`losses`."""
        return Difference.of(self.losses, self.noise)

    @property
    def at_equal_compute(self) -> Difference | None:
        """Of :attr:`losses_at_equal_compute`; None where the compute differs from that of a model off the line."""
        same = LESS < self.active < 1 / LESS
        if not same and not any(self.theirs is self.rows.get(name) for name in LINE):
            return None
        return Difference.of(self.losses_at_equal_compute, self.equal_noise)

    @property
    def active(self) -> float:
        """Parameters that a token meets, as a share of theirs."""
        return fmean(self.ours.active) / fmean(self.theirs.active)

    def _line(self, seed: int, active: float) -> float:
        """Loss of softmax top-k with so many active parameters; straight lines between its points, and beyond them."""
        points = [self.rows[name] for name in LINE if name in self.rows and len(self.rows[name].loss) > seed]
        if len(points) < 2:
            return 0.0
        x = np.array([point.active[seed] for point in points])
        y = np.array([point.loss[seed] for point in points])
        at = int(np.clip(np.searchsorted(x, active), 1, len(x) - 1))
        slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
        return float(y[at - 1] + slope * (active - x[at - 1]))


def _compute(it: Comparison) -> str:
    return it.loss.verdict(TOLERANCE) if it.active < LESS else "no"


def _throughput(it: Comparison) -> str:
    if not it.ours.forward or not it.theirs.forward:
        return "unclear"
    _, low, high = ratio(it.ours.forward, it.theirs.forward)
    return "yes" if low > 1 / LESS else "no" if high < 1 / LESS else "unclear"


def _lower(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return Difference.of(minus(ours, theirs)).verdict()


_JUDGES: dict[str, Callable[[Comparison], str]] = {
    "quality": lambda it: it.at_equal_compute.verdict() if it.at_equal_compute else "unclear",
    "parity": lambda it: it.loss.verdict(TOLERANCE),
    "compute": _compute,
    "balance": lambda it: _lower(it.ours.imbalance, it.theirs.imbalance),
    "imbalance": lambda it: _lower(it.theirs.imbalance, it.ours.imbalance),
    "specialization": lambda it: _lower(it.theirs.specialization, it.ours.specialization),
    "throughput": _throughput,
    "worse": lambda it: Difference.of([-each for each in it.losses], it.noise).verdict(),
}


def judge(entry: Entry, comparison: Comparison) -> dict[str, str]:
    """Claim to verdict."""
    return {claim: _JUDGES[claim](comparison) for claim in entry.claims}


def together(verdicts: Mapping[str, str]) -> str:
    """``yes`` where every claim shows, ``no`` where one surely does not, else ``unclear``."""
    found = set(verdicts.values())
    return "no" if "no" in found else "unclear" if "unclear" in found else "yes"
