"""Which domain the next passages come from: more from where the student is still far from its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesaic.errors import ConfigError


class ExcessLossMixture:
    """Shares of the domains, moved towards those whose loss exceeds the reference's most (DoReMi: Optimizing Data
    Mixtures Speeds Up Language Model Pretraining, section 2, algorithm 1, by Xie et al.).

    A step with mean excess losses λ, those below 0 counted as 0, multiplies each share by ``exp(rate λ)``; the shares
    are then scaled to sum to 1, and mixed with ``smoothing`` of the first ones; the next step starts from these, so
    that shares that were moved for long still turn round within a few steps. There the reference is a small model
    trained before and the shares weigh the loss of a proxy model; here it is the teacher, and passages are drawn by the
    shares, so that a domain that a step did not draw keeps its last known excess. There each token's excess counts as 0
    below 0; here the mean of a domain's tokens does, so that tokens at which student and teacher merely differ do not
    count as being behind.

    Args:
        shares: the first shares by domain, in any unit, all above 0.
        rate: η; 0 keeps the first shares.
        smoothing: c, from 0 to 1: the part of the first shares that always stays.

    Attributes:
        shares: the present shares; they sum to 1.

    Raises:
        ConfigError: for shares or settings out of range.
    """

    def __init__(self, shares: Mapping[str, float], rate: float = 0.1, smoothing: float = 0.3) -> None:
        if not shares or any(not (math.isfinite(share) and share > 0) for share in shares.values()):
            raise ConfigError(f"the shares of the domains are {dict(shares)}: there must be some, all above 0")
        if not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"rate is {rate}: it must be finite and at least 0")
        if not 0 <= smoothing <= 1:
            raise ConfigError(f"smoothing is {smoothing}: it must be from 0 to 1")
        total = sum(shares.values())
        self.first = {name: share / total for name, share in shares.items()}
        self.rate, self.smoothing = rate, smoothing
        self.excess = dict.fromkeys(self.first, 0.0)
        self.shares = dict(self.first)
        self._credit = dict.fromkeys(self.first, 0.0)

    def draw(self, rows: int) -> list[str]:
        """The domains of the next ``rows`` passages: without chance, each as often as its shares add up to."""
        drawn = []
        for _ in range(rows):
            for name, share in self.shares.items():
                self._credit[name] += share
            chosen = max(self._credit, key=lambda name: self._credit[name])
            self._credit[chosen] -= 1
            drawn.append(chosen)
        return drawn

    def after_step(self, excess: Mapping[str, float]) -> None:
        """Told after each step: the mean of student minus teacher loss for each domain that it drew, in nats."""
        self.excess.update({name: max(0.0, value) for name, value in excess.items()})
        highest = max(self.excess.values())  # taken off first, or the exponential could be infinite
        raised = {
            name: share * math.exp(self.rate * (self.excess[name] - highest)) for name, share in self.shares.items()
        }
        total = sum(raised.values())
        own = {name: max(share / total, 1e-12) for name, share in raised.items()}
        self.shares = {name: (1 - self.smoothing) * own[name] + self.smoothing * self.first[name] for name in own}

    def state(self) -> dict[str, Any]:
        """What :meth:`load` takes to go on from here, as JSON can hold it."""
        return {"shares": dict(self.shares), "credit": dict(self._credit), "excess": dict(self.excess)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.shares, self._credit, self.excess = (
            {name: float(state[part][name]) for name in self.first} for part in ("shares", "credit", "excess")
        )
