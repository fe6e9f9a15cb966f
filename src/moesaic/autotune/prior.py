"""What a call should take before anything has been timed: a cost model with four constants a backend.

A call of N rows on A experts takes about ``base + A · (expert + bytes / bandwidth) + N · flops / rate`` (roofline's two
roofs, added rather than the higher taken: the smooth sum ranks as well, and is two multiplications). Only the ranking
matters: the tuner scales all of it by what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.autotune.signature import Family
from moesaic.experts import Backend

# Forward and backward do three times the work of forward.
_TRAINING = 3.0


@dataclass(frozen=True)
class Speeds:
    """Four constants of a backend. ``bandwidth`` and ``rate`` are for one thread where the device is a CPU.

    Attributes:
        base: seconds of a call without rows.
        expert: seconds for each expert that has rows, beyond reading its weights.
        bandwidth: bytes of weights per second.
        rate: floating-point operations per second.
    """

    base: float
    expert: float
    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Cost:
    """Seconds of a call: ``base + active · per_expert + rows · per_row``."""

    base: float
    per_expert: float
    per_row: float

    def seconds(self, rows: int, active: int) -> float:
        """Of a call with ``rows`` routed rows on ``active`` experts."""
        return self.base + active * self.per_expert + rows * self.per_row

    def times(self, factor: float) -> Cost:
        """The same, ``factor`` times as long."""
        return Cost(self.base * factor, self.per_expert * factor, self.per_row * factor)


# Fitted to medians on one thread of an AMD EPYC (Zen 5, AVX-512-BF16) virtual machine, PyTorch 2.13.
_CPU: dict[tuple[str, str], Speeds] = {
    ("loop", "float32"): Speeds(120e-6, 40e-6, 9e9, 70e9),
    ("grouped", "float32"): Speeds(150e-6, 15e-6, 9e9, 75e9),
    ("loop", "bfloat16"): Speeds(120e-6, 40e-6, 7e9, 150e9),
    ("grouped", "bfloat16"): Speeds(150e-6, 15e-6, 7e9, 150e9),
    ("native", "float32"): Speeds(60e-6, 2e-6, 17e9, 80e9),
    ("native", "bfloat16"): Speeds(60e-6, 2e-6, 17e9, 170e9),
    # Without a kernel for codes, every expert is first turned into floats.
    ("loop", "int8"): Speeds(120e-6, 80e-6, 0.5e9, 70e9),
    ("native", "int8"): Speeds(60e-6, 2e-6, 15e9, 170e9),
    ("loop", "int4"): Speeds(120e-6, 80e-6, 0.2e9, 70e9),
    ("native", "int4"): Speeds(60e-6, 2e-6, 12e9, 170e9),
}
# No card was at hand: orders of magnitude of a data-centre GPU, which order the candidates for the first calls.
_GPU: dict[tuple[str, str], Speeds] = {
    ("loop", "bfloat16"): Speeds(300e-6, 80e-6, 1.0e12, 200e12),
    ("grouped", "bfloat16"): Speeds(250e-6, 1e-6, 1.5e12, 300e12),
    ("triton", "bfloat16"): Speeds(120e-6, 1e-6, 1.6e12, 280e12),
    ("loop", "float32"): Speeds(300e-6, 80e-6, 1.0e12, 20e12),
    ("grouped", "float32"): Speeds(250e-6, 60e-6, 1.0e12, 20e12),
    ("triton", "float32"): Speeds(120e-6, 1e-6, 1.6e12, 25e12),
    ("loop", "int8"): Speeds(300e-6, 150e-6, 0.2e12, 100e12),
    ("loop", "int4"): Speeds(300e-6, 200e-6, 0.1e12, 100e12),
}
_UNKNOWN = Speeds(100e-6, 10e-6, 10e9, 100e9)


def costs(family: Family, backends: Mapping[str, Backend]) -> dict[str, Cost]:
    """The cost of each of ``backends`` for a family.

    One that the model does not know (a user's own) is placed beside the best of those that it does know: a tenth
    cheaper where its ``preference`` is the highest of all, else a tenth dearer.
    """
    table = _CPU if family.threads else _GPU
    stored = family.format if family.format in ("float32", "int8", "int4") else "bfloat16"
    known = {name: _cost(family, table[name, stored]) for name in backends if (name, stored) in table}
    highest = max((backends[name].preference for name in known), default=0)
    found = dict(known)
    for name, backend in backends.items():
        if name not in known:
            nearest = max(known, key=lambda name: backends[name].preference, default=None)
            cost = known[nearest] if nearest is not None else _cost(family, _UNKNOWN)
            found[name] = cost.times(0.9 if backend.preference > highest else 1.1)
    return found


def _cost(family: Family, speeds: Speeds) -> Cost:
    threads = max(1, family.threads)
    cost = Cost(
        speeds.base,
        speeds.expert + family.bytes_per_expert / (speeds.bandwidth * threads),
        family.flops_per_row / (speeds.rate * threads),
    )
    return cost.times(_TRAINING) if family.grad else cost
