"""The engine's thread: what is told, and in which order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from moesaic.serve.request import EngineStats, Output
from moesaic.serve.server.loop import EngineLoop
from moesaic.serve.server.stats import NOTHING


class Slow:
    """An engine without work, whose numbers take a moment to be gathered."""

    has_work = False
    slots = 0

    def stats(self) -> EngineStats:
        slots = self.slots
        time.sleep(0.05)
        return replace(NOTHING, slots_used=slots)


class Told:
    """What the listener has heard last."""

    slots: int | None = None

    def on_loaded(self, loaded: Any) -> None: ...

    def on_load_failed(self, error: BaseException) -> None: ...

    def on_step(self, outputs: Sequence[Output], at: float, stats: EngineStats | None) -> None:
        self.slots = None if stats is None else stats.slots_used

    def on_failure(self, request_ids: Sequence[str], beyond_repair: bool) -> None: ...


def test_who_waited_for_a_call_finds_its_numbers_told() -> None:
    async def calls() -> list[int | None]:
        told = Told()
        loop = EngineLoop(lambda: SimpleNamespace(engine=Slow()), told)
        loop.start(asyncio.get_running_loop())
        seen = []
        for slots in (4, 0, 7):
            await loop.call(lambda engine, slots=slots: setattr(engine, "slots", slots))
            seen.append(told.slots)
        loop.stop()
        assert loop.join(10)
        return seen

    assert asyncio.run(calls()) == [4, 0, 7]
