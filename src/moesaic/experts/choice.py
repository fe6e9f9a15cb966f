"""What was chosen for one call, and why: the answer to "which kernel computed this?"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Estimate:
    """What is known about one candidate's time for one call.

    Attributes:
        backend: its name.
        seconds: expected for the call.
        samples: timings of this very kind of call that the figure rests on; 0 where it comes from elsewhere.
        source: ``"measured"`` (this kind of call), ``"nearby"`` (a neighbouring kind), or ``"prior"`` (the cost model).
    """

    backend: str
    seconds: float
    samples: int
    source: str


@dataclass
class Choice:
    """Which backend computed a call, and why.

    Attributes:
        backend: its name; ``"low-rank"`` where every token has an adapter's part, which no backend computes.
        why: ``"fixed"`` (asked for by name), ``"only"`` (no other can run the call), ``"prior"`` (by the cost model),
            ``"measured"`` (by timings), ``"exploring"`` (to time this candidate), ``"failed"`` (the candidate that was
            explored raised an error, so the best one computed the call), ``"replayed"``, ``"row-invariant"``
            (see :mod:`moesaic.experts.row_invariance`), ``"routed"`` (together with its routes in one native call, see
            :mod:`moesaic.few_tokens`), or ``"rule"`` (the backends'
            own order of preference: while compiling, on the meta device, and where no tuner is loaded).
        signature: the kind of call, a :class:`moesaic.autotune.Signature`; None where nothing had to be compared.
        estimates: the candidates, the fastest first; empty where nothing had to be compared.
    """

    backend: str
    why: str
    signature: object | None = None
    estimates: tuple[Estimate, ...] = ()

    def __str__(self) -> str:
        """One line: ``native (measured): native 2.31 ms, grouped 5.20 ms (nearby) | cpu bfloat16 ...``."""
        line = f"{self.backend} ({self.why})"
        if self.estimates:
            line += ": " + ", ".join(_told(each) for each in self.estimates)
        return line if self.signature is None else f"{line} | {self.signature}"


def _told(estimate: Estimate) -> str:
    origin = "" if estimate.source == "measured" else f" ({estimate.source})"
    return f"{estimate.backend} {estimate.seconds * 1e3:.3g} ms{origin}"
