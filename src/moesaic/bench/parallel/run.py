"""What every part of the benchmark is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.bench.parallel.lab import Setting, missing


@dataclass
class Run:
    """One run of the benchmark.

    Attributes:
        tell: takes a line on what is being done.
        quick: fewer points, shorter.
        seconds: when they are over, the grid begins no further point; None: never.
        earlier: part to what a former run wrote of it, where this one continues it.
        lab: why there are no network namespaces, or None.
    """

    tell: Callable[[str], None]
    quick: bool = False
    seconds: float | None = None
    earlier: Mapping[str, Any] = field(default_factory=dict)
    lab: str | None = field(default_factory=missing)
    start: float = field(default_factory=time.perf_counter)
    interrupted: bool = False

    @property
    def is_over(self) -> bool:
        """Whether no time is left, or somebody interrupted."""
        return self.interrupted or (self.seconds is not None and time.perf_counter() - self.start > self.seconds)

    def possible(self, settings: tuple[Setting, ...]) -> list[Setting]:
        """Those of the settings that this machine can make."""
        return [setting for setting in settings if self.lab is None or not setting.uses_namespaces]

    def skipped(self, settings: tuple[Setting, ...]) -> list[str]:
        """A line on those that it cannot make."""
        names = [str(setting) for setting in settings if setting.uses_namespaces]
        return [f"not measured, because {self.lab}: {'; '.join(names)}"] if self.lab and names else []
