"""What a call should take before anything has been timed: a cost model with four constants a backend.

A call of N rows on A experts takes about ``base + A · (expert + bytes / bandwidth) + N · flops / rate`` (roofline's two
roofs, added rather than the higher taken: the smooth sum ranks as well, and is two multiplications). Only the ranking
matters: the tuner scales all of it by what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.autotune.signature import Family
from moesaic.experts import Backend
from moesaic.registry import Registry

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


# Fitted to the fast quarter of a few runs of 4 to 1024 rows on 4 to 16 experts of D 64, F 64 and of D 1024, F 1024, on
# one thread of a 2-core AMD EPYC (Zen 5, AVX-512-BF16) virtual machine with PyTorch 2.13; within a fifth of each.
_CPU: dict[tuple[str, str], Speeds] = {
    ("native", "float32"): Speeds(8e-6, 0.5e-6, 37e9, 158e9),
    ("grouped", "float32"): Speeds(47e-6, 35e-6, 17e9, 85e9),
    ("loop", "float32"): Speeds(40e-6, 37e-6, 17e9, 83e9),
    ("native", "bfloat16"): Speeds(18e-6, 0.5e-6, 45e9, 370e9),
    ("grouped", "bfloat16"): Speeds(400e-6, 10e-6, 15e9, 306e9),
    ("loop", "bfloat16"): Speeds(210e-6, 37e-6, 15e9, 365e9),
    ("native", "int8"): Speeds(13e-6, 2e-6, 47e9, 308e9),
    ("native", "int4"): Speeds(5e-6, 3e-6, 15e9, 250e9),
    # Without a kernel for codes, each expert that has rows is turned into floats first.
    ("grouped", "int8"): Speeds(190e-6, 100e-6, 1.1e9, 100e9),
    ("loop", "int8"): Speeds(190e-6, 100e-6, 1.1e9, 100e9),
    ("grouped", "int4"): Speeds(120e-6, 130e-6, 0.37e9, 100e9),
    ("loop", "int4"): Speeds(120e-6, 130e-6, 0.37e9, 100e9),
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
    ("grouped", "int8"): Speeds(300e-6, 100e-6, 0.2e12, 100e12),
    ("loop", "int4"): Speeds(300e-6, 200e-6, 0.1e12, 100e12),
    ("grouped", "int4"): Speeds(300e-6, 150e-6, 0.1e12, 100e12),
}
# A backend that even the reference is preferred to is not tried by itself (Triton's interpreter, for one).
_LAST_RESORT = 10.0
_UNKNOWN = Speeds(100e-6, 10e-6, 10e9, 100e9)


def costs(family: Family, backends: Registry[Backend]) -> dict[str, Cost]:
    """The cost of every registered backend for a family.

    One that the model does not know (a user's own) is placed by its ``preference``: a tenth cheaper than the next one
    below it that the model knows, or far dearer than all where there is none.
    """
    table = _CPU if family.threads else _GPU
    stored = family.format if family.format in ("float32", "int8", "int4") else "bfloat16"
    found = {name: _cost(family, table[name, stored]) for name in backends if (name, stored) in table}
    known = sorted((backends.get(name).preference, name) for name in found)
    for name in backends:
        if name not in found:
            below = [each for each in known if each[0] <= backends.get(name).preference]
            if below:
                found[name] = found[below[-1][1]].times(0.9)
            else:
                found[name] = (found[known[0][1]] if known else _cost(family, _UNKNOWN)).times(_LAST_RESORT)
    return found


def _cost(family: Family, speeds: Speeds) -> Cost:
    threads = max(1, family.threads)
    cost = Cost(
        speeds.base,
        speeds.expert + family.bytes_per_expert / (speeds.bandwidth * threads),
        family.flops_per_row / (speeds.rate * threads),
    )
    return cost.times(_TRAINING) if family.grad else cost
