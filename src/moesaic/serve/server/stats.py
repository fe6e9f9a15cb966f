"""``GET /stats``: what the server does now, for its page and for whoever wants JSON instead of ``/metrics``."""

from __future__ import annotations

import time
from collections import deque
from typing import Literal

from pydantic import BaseModel

from moesaic.serve.request import EngineStats

WINDOW_SECONDS = 5.0
NOTHING = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}, 0, 0)

State = Literal["loading", "ready", "draining", "failed"]


class Sequences(BaseModel):
    """Sequences now; ``finished``: requests since the start."""

    running: int
    waiting: int
    finished: int


class Tokens(BaseModel):
    """Since the start; ``cached``: of prompts, found in the prefix tree instead of computed."""

    prompt: int
    cached: int
    generated: int


class Pages(BaseModel):
    """Of the KV cache; cached ones hold prefixes and are free for the taking. ``size``: tokens of one."""

    total: int
    used: int
    cached: int
    size: int


class Slots(BaseModel):
    """Places for experts of adapters, of all layers together."""

    used: int
    total: int


class AdapterUse(BaseModel):
    """An adapter, and its sequences in flight."""

    name: str
    running: int
    state: Literal["ready", "unloading"]


class ExpertLoad(BaseModel):
    """Rows that each expert of a layer has computed since the start; an adapter's copy counts as its expert."""

    layer: str
    load: list[int]


class Rates(BaseModel):
    """Tokens per second over the last seconds."""

    prompt: float
    generated: float


class Stats(BaseModel):
    """What the server does now. ``uptime``: seconds, the clock of all that counts since the start."""

    model: str
    state: State
    uptime: float
    chat: bool
    max_context: int
    max_batch: int
    max_queue: int
    steps: int
    preemptions: int
    requests: Sequences
    tokens: Tokens
    rates: Rates
    pages: Pages
    slots: Slots
    adapters: list[AdapterUse]
    experts: list[ExpertLoad]


class RateWindow:
    """Counters over the last :data:`WINDOW_SECONDS`; times are of any one clock."""

    def __init__(self, now: float) -> None:
        self._start = now
        self._seen = deque([(now, 0, 0)])

    def record(self, now: float, prompt: int, generated: int) -> None:
        """What the counters are now."""
        self._seen.append((now, prompt, generated))
        self._forget(now)

    def rates(self, now: float) -> Rates:
        """Per second."""
        self._forget(now)
        (_, prompt_before, generated_before), (_, prompt, generated) = self._seen[0], self._seen[-1]
        seconds = max(min(WINDOW_SECONDS, now - self._start), 1e-3)
        return Rates(prompt=(prompt - prompt_before) / seconds, generated=(generated - generated_before) / seconds)

    def _forget(self, now: float) -> None:
        # The last one before the window stays: what the counters were when it began.
        while len(self._seen) > 1 and self._seen[1][0] <= now - WINDOW_SECONDS:
            self._seen.popleft()


class Gauge:
    """The engine's numbers as they were last seen."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._window = RateWindow(self._started)
        self.engine = NOTHING

    def see(self, stats: EngineStats) -> None:
        """Newer numbers."""
        self.engine = stats
        self._window.record(time.monotonic(), stats.prompt_tokens, stats.generated_tokens)

    @property
    def uptime(self) -> float:
        """Seconds."""
        return time.monotonic() - self._started

    def rates(self) -> Rates:
        """Tokens per second."""
        return self._window.rates(time.monotonic())
