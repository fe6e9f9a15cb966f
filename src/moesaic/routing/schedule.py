"""The coefficient of a balancer over the optimizer steps: constant, or from one value to another, after a warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError, did_you_mean
from moesaic.routing.options import is_of

SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A coefficient as a function of the optimizer steps that have been done.

    ``warmup`` steps take it from 0 up to ``coefficient`` in a line, the next ``steps`` from there to ``final``, in a
    line or in half a cosine; then it stays.

    Args:
        coefficient: at least 0.
        final: what it ends at; None for a constant one.
        steps: from ``coefficient`` to ``final``, the warm-up not counted.
        schedule: ``constant``, ``linear`` or ``cosine``; by default linear where there is a ``final``.
        warmup: steps of warm-up; the first one has ``coefficient / warmup`` already.
    """

    coefficient: float
    final: float | None = None
    steps: int | None = None
    schedule: str = "constant"
    warmup: int = 0

    @property
    def varies(self) -> bool:
        """Whether it needs to know the step."""
        return self.schedule != "constant" or self.warmup > 0

    def at(self, step: Tensor) -> Tensor:
        """The coefficient in the step that follows ``step`` done ones.

        Args:
            step: int64 scalar, on any device: nothing waits for it.

        Returns:
            float32 scalar on the same device.
        """
        done = step.to(torch.float32)
        value = torch.full_like(done, self.coefficient)
        if self.schedule != "constant":
            assert self.final is not None
            assert self.steps is not None
            part = ((done - self.warmup) / self.steps).clamp(0.0, 1.0)
            if self.schedule == "cosine":
                part = (1.0 - torch.cos(math.pi * part)) / 2.0
            value = self.coefficient + (self.final - self.coefficient) * part
        if self.warmup:
            value = value * ((done + 1.0) / self.warmup).clamp(max=1.0)
        return value


KEYS = tuple(field.name for field in fields(Schedule))


def schedule_of(name: str, entry: object) -> Schedule:
    """The schedule in a balancer's entry: a number, or a table, whose other keys are not looked at.

    Args:
        name: of the balancer, for messages.

    Raises:
        ConfigError: for a value out of range, and for keys that do not go together.
    """
    if not isinstance(entry, Mapping):
        return Schedule(_coefficient(name, "coefficient", entry))
    given: dict[str, Any] = {key: entry[key] for key in KEYS if entry.get(key) is not None}
    if "coefficient" not in given:
        raise ConfigError(f"balancer {name!r} needs a coefficient beside {', '.join(map(repr, entry)) or 'nothing'}")
    for key in ("coefficient", "final"):
        if key in given:
            _coefficient(name, key, given[key])
    for key, least in (("steps", 1), ("warmup", 0)):
        if key in given and not (is_of(int, given[key]) and given[key] >= least):
            raise ConfigError(
                f"{key} of balancer {name!r} is {given[key]!r}: it must be a whole number, at least {least}"
            )
    shape = given.setdefault("schedule", "linear" if "final" in given else "constant")
    if shape not in SHAPES:
        raise ConfigError(f"schedule of balancer {name!r} is {shape!r}: {did_you_mean(str(shape), SHAPES)}")
    needed = [] if shape == "constant" else [key for key in ("final", "steps") if key not in given]
    if needed:
        raise ConfigError(f"balancer {name!r} with the schedule {shape!r} needs {' and '.join(needed)}")
    if shape == "constant" and (idle := [key for key in ("final", "steps") if key in given]):
        raise ConfigError(
            f"balancer {name!r} has {' and '.join(idle)} but the schedule 'constant': leave it out, "
            "or choose 'linear' or 'cosine'"
        )
    return Schedule(**given)


def with_steps(balancing: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same entries, those that have a ``final`` but no ``steps`` ending with the last one of a run of ``steps``."""
    filled: dict[str, Any] = {}
    for name, entry in balancing.items():
        if isinstance(entry, Mapping) and "coefficient" in entry:
            entry = dict(entry)
            moves = entry.get("final") is not None or entry.get("schedule") in ("linear", "cosine")
            warmup = entry.get("warmup") or 0
            if moves and entry.get("steps") is None and is_of(int, warmup):
                entry["steps"] = max(1, steps - warmup)
        filled[name] = entry
    return filled


def _coefficient(name: str, key: str, value: Any) -> float:
    what = f"the coefficient of balancer {name!r}" if key == "coefficient" else f"{key} of balancer {name!r}"
    # The two messages apart: a table in place of a number is another mistake than a number out of range.
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{what} is {value!r}: it must be a number")
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{what} is {value}: it must be finite and at least 0")
    return value
