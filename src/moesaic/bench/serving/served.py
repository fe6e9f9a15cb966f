"""What came of a load: when each token of each request was there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MOST_OTHERS = 0.05


@dataclass(frozen=True)
class Served:
    """One load, served by one contender.

    Attributes:
        name: of the contender.
        seconds: from the first request that was sent to the last token.
        requests: how many.
        prompt_tokens, new_tokens: of all of them.
        times: of each request, in the load's order: when its tokens were there, in seconds since the start. Empty where
            the contender does not tell.
        others: the share of all CPUs' time that other processes used meanwhile; None where that is not known.
        experts: distinct ones, adapters' included, that a layer computed in a step, on average; 0: unknown.
        steps: when each step of the engine ended; empty: unknown.
    """

    name: str
    seconds: float
    requests: int
    prompt_tokens: int
    new_tokens: int
    times: tuple[tuple[float, ...], ...] = ()
    others: float | None = None
    experts: float = 0.0
    steps: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """New tokens per second."""
        return self.new_tokens / self.seconds

    @property
    def is_disturbed(self) -> bool:
        """Whether other processes used so much of the machine that the figures mean little."""
        return self.others is not None and self.others > _MOST_OTHERS

    def gaps(self, requests: Sequence[int] | None = None) -> Gaps:
        """The times between successive tokens, of all requests or of these."""
        chosen = self.times if requests is None else [self.times[i] for i in requests]
        return Gaps(np.concatenate([np.diff(times) for times in chosen if len(times) > 1]))

    def longest_step(self) -> float:
        """Seconds of the longest step."""
        return float(np.diff(self.steps, prepend=0.0).max())

    def waits(self) -> float:
        """Median seconds to a request's first token."""
        return float(np.median([times[0] for times in self.times if times]))


@dataclass(frozen=True)
class Gaps:
    """Seconds between successive tokens of a request."""

    seconds: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.seconds.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))

    @property
    def max(self) -> float:
        return float(self.seconds.max())
