"""Clients that a server must bear: patient ones, hasty ones, wrong ones, and one that moves adapters.

Every answer is judged at once: what is not what the API promises for that request is a fault of the server's.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.bench.soak.wire import BROKEN, Answer, Wire

FAULTS_KEPT = 20
_SHAPE = "[a-f]{2,8}"
_TOPICS = [f"You answer questions about topic {i}. " + f"Be short, exact and kind. Rule {i}: " * 4 for i in range(8)]


@dataclass
class Tally:
    """What was asked, what came back, and what should not have come back.

    Attributes:
        outcomes: (kind of request, outcome) to how often.
        faults: descriptions of the first few; ``fault_count``: of all.
        seconds: of each answer that was waited for to its end.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    seconds: list[float] = field(default_factory=list)

    def came(self, kind: str, outcome: object) -> None:
        """An outcome that may be."""
        self.outcomes[kind, str(outcome)] += 1

    def fault(self, kind: str, what: str) -> None:
        """One that may not be."""
        self.outcomes[kind, "FAULT"] += 1
        self.fault_count += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(f"{kind}: {what}")

    @property
    def requests(self) -> int:
        """All of them."""
        return sum(self.outcomes.values())

    def rows(self) -> list[tuple[str, str]]:
        """Kind, and its outcomes with their numbers."""
        kinds = sorted({kind for kind, _ in self.outcomes})
        return [
            (kind, ", ".join(f"{n} × {what}" for (of, what), n in sorted(self.outcomes.items()) if of == kind))
            for kind in kinds
        ]

    def median_seconds(self) -> float:
        """Of the answers that were waited for; 0 without any."""
        return statistics.median(self.seconds) if self.seconds else 0.0


class Client:
    """One client, which asks one thing after the other.

    Args:
        base: the base model's name. adapters: names that are loaded now and then.
    """

    def __init__(self, wire: Wire, tally: Tally, base: str, adapters: Sequence[str], context: int, seed: int) -> None:
        self._wire, self._tally, self._base, self._adapters = wire, tally, base, adapters
        self._context = context
        self._dice = random.Random(seed)
        kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.whole, 30),
            (self.stream, 25),
            (self.leave_stream, 14),
            (self.leave_whole, 6),
            (self.leave_asking, 2),
            (self.constrained, 5),
            (self.malformed, 14),
            (self.look, 6),
        ]
        self._kinds, self._weights = zip(*kinds, strict=True)

    async def run(self, until: float) -> None:
        """Ask until ``time.monotonic()`` is ``until``."""
        while time.monotonic() < until:
            (kind,) = self._dice.choices(self._kinds, self._weights)
            try:
                await kind()
            except BROKEN as error:
                self._tally.fault(kind.__name__, f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    async def whole(self) -> None:
        """An answer in one piece, of one to three continuations."""
        path, body = self._question(n=self._dice.choice([1, 1, 1, 2, 3]))
        start = time.monotonic()
        async with self._wire.ask("POST", path, body) as answer:
            if not await self._good("whole", answer, body):
                return
            told = await answer.json()
        self._tally.seconds.append(time.monotonic() - start)
        if len(told["choices"]) != body["n"] or told["usage"]["completion_tokens"] > body["n"] * body["max_tokens"]:
            self._tally.fault("whole", f"{body['n']} choices were asked for, and came {json.dumps(told)[:300]}")

    async def stream(self) -> None:
        """A stream, read to its end."""
        path, body = self._question(stream=True)
        start = time.monotonic()
        async with self._wire.ask("POST", path, body) as answer:
            if not await self._good("stream", answer, body):
                return
            lines = [line async for line in answer.lines()]
        self._tally.seconds.append(time.monotonic() - start)
        if lines[-1:] != ["data: [DONE]"]:
            self._tally.fault("stream", f"the stream ended with {lines[-1:]}")

    async def leave_stream(self) -> None:
        """A stream whose client goes away after a few pieces."""
        path, body = self._question(stream=True)
        left = self._dice.randrange(4)
        async with self._wire.ask("POST", path, body) as answer:
            if not await self._good("leave_stream", answer, body):
                return
            async for _ in answer.lines():
                left -= 1
                if left < 0:
                    return

    async def leave_whole(self) -> None:
        """An answer whose client does not wait for it."""
        path, body = self._question()
        try:
            async with asyncio.timeout(self._dice.uniform(0.001, 0.3)):
                async with self._wire.ask("POST", path, body) as answer:
                    await self._good("leave_whole", answer, body)
        except TimeoutError:
            self._tally.came("leave_whole", "left")

    async def leave_asking(self) -> None:
        """Half of a request, or what is none."""
        half = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        async with self._wire.connection() as (_, writer):
            writer.write(self._dice.choice([half, half[: self._dice.randrange(len(half))], self._dice.randbytes(40)]))
            await writer.drain()
        self._tally.came("leave_asking", "left")

    async def constrained(self) -> None:
        """A text that must have a shape."""
        path, body = self._question(regex=_SHAPE)
        async with self._wire.ask("POST", path, body) as answer:
            if not await self._good("constrained", answer, body):
                return
            choice = (await answer.json())["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        if choice["finish_reason"] == "stop" and not re.fullmatch(_SHAPE, text):
            self._tally.fault("constrained", f"{text!r} does not match {_SHAPE}")

    async def malformed(self) -> None:
        """What no server should answer."""
        name, content, path, statuses = self._dice.choice(self._nonsense())
        async with self._wire.ask("POST", path, content) as answer:
            # Whether there is room is looked at before the prompt is.
            await self._expect("malformed", answer, statuses | {429}, name)

    async def look(self) -> None:
        """The page, the numbers, the lists."""
        path = self._dice.choice(["/", "/page/page.js", "/stats", "/metrics", "/v1/models", "/v1/adapters", "/health"])
        async with self._wire.ask("GET", path) as answer:
            await self._expect("look", answer, {200}, path)

    def _question(self, **more: Any) -> tuple[str, dict[str, Any]]:
        dice = self._dice
        text = dice.choice(_TOPICS) if dice.random() < 0.7 else ""
        text += "".join(dice.choices(string.ascii_lowercase + " ", k=dice.randint(1, 200)))
        model = dice.choice(self._adapters) if self._adapters and dice.random() < 0.4 else self._base
        # Long answers grow out of the pages that there were when they began.
        tokens = dice.randint(1, 48) if dice.random() < 0.8 else dice.randint(100, 300)
        body = {"model": model, "max_tokens": tokens, "temperature": dice.choice([0.0, 0.7, 1.0]), **more}
        if dice.random() < 0.5:
            return "/v1/completions", {**body, "prompt": text}
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}

    def _nonsense(self) -> list[tuple[str, bytes, str, set[int]]]:
        """(what, body, path, statuses that are right)."""
        completion = {"model": self._base, "prompt": "x", "max_tokens": 4}
        wrong: list[tuple[str, dict[str, Any], int]] = [
            ("unknown model", {"model": "nobody"}, 404),
            ("negative tokens", {"max_tokens": -1}, 400),
            ("text for a number", {"temperature": "hot"}, 400),
            ("long prompt", {"prompt": "x" * (self._context + 1)}, 400),
            ("empty prompt", {"prompt": []}, 400),
            ("unknown field", {"colour": "red"}, 400),
            ("token id", {"prompt": [2**31]}, 400),
            ("impossible pattern", {"regex": "(["}, 400),
            ("impossible schema", {"response_format": {"type": "json_schema", "json_schema": {}}}, 400),
            ("too many", {"n": 100000}, 400),
        ]
        bodies = [
            (name, json.dumps(completion | change).encode(), "/v1/completions", {status})
            for name, change, status in wrong
        ]
        return [
            *bodies,
            ("broken JSON", b'{"model": ', "/v1/chat/completions", {400}),
            ("no text", bytes(self._dice.randbytes(50)), "/v1/chat/completions", {400}),
            ("no object", b"[]", "/v1/completions", {400}),
            ("no such path", b"{}", "/v1/embeddings", {404}),
            ("deep JSON", b"[" * 5000, "/v1/completions", {400}),
        ]

    async def _good(self, kind: str, answer: Answer, body: dict[str, Any]) -> bool:
        """Whether it is answered; full queues and adapters that are not there are no fault."""
        status = answer.status
        if status == 429 and answer.headers.get("retry-after", "").isdigit():
            self._tally.came(kind, status)
            await asyncio.sleep(self._dice.uniform(0.1, 1))  # not as long as it says: pressure is the point
            return False
        if status == 404 and body["model"] != self._base:
            self._tally.came(kind, status)
            return False
        return await self._expect(kind, answer, {200}, json.dumps(body))

    async def _expect(self, kind: str, answer: Answer, statuses: set[int], what: str) -> bool:
        if answer.status in statuses:
            self._tally.came(kind, answer.status)
            return True
        self._tally.fault(kind, f"{answer.status} {(await answer.text())[:300]} for {what[:500]}")
        return False


class AdapterMover:
    """Loads and unloads adapters without an end, and tries some that cannot be loaded.

    Args:
        adapters: names, which are their folders' too. broken: paths that must be refused.
    """

    def __init__(self, wire: Wire, tally: Tally, adapters: Sequence[str], broken: Sequence[str], seed: int) -> None:
        self._wire, self._tally, self._broken = wire, tally, broken
        self._loaded = dict.fromkeys(adapters, False)
        self._dice = random.Random(seed)

    async def run(self, until: float) -> None:
        """Move them until ``time.monotonic()`` is ``until``."""
        while time.monotonic() < until:
            if self._broken and self._dice.random() < 0.2:
                await self.load_broken()
            else:
                await self.move(self._dice.choice(list(self._loaded)))
            await asyncio.sleep(self._dice.uniform(0.02, 0.3))

    async def move(self, name: str) -> None:
        """Load it where it is not loaded, unload it where it is."""
        if self._loaded[name]:
            await self._expect("unload", "DELETE", f"/v1/adapters/{name}", None, {200, 202})
            self._loaded[name] = False
        else:
            # 409: requests still use the one that was unloaded.
            status = await self._expect("load", "POST", "/v1/adapters", {"name": name, "path": name}, {201, 409})
            self._loaded[name] = status == 201

    async def load_broken(self) -> None:
        """One that must be refused."""
        body = {"name": "broken", "path": self._dice.choice(self._broken)}
        await self._expect("load broken", "POST", "/v1/adapters", body, {400, 403})

    async def _expect(self, kind: str, method: str, path: str, body: Any, right: set[int]) -> int:
        try:
            async with self._wire.ask(method, path, body) as answer:
                if answer.status in right:
                    self._tally.came(kind, answer.status)
                else:
                    self._tally.fault(kind, f"{answer.status} {(await answer.text())[:300]} for {path} {body}")
                return answer.status
        except BROKEN as error:
            self._tally.fault(kind, f"{type(error).__name__}: {error}")
            return 0

    async def unload_all(self) -> None:
        """Leave none."""
        for name, loaded in self._loaded.items():
            if loaded:
                await self.move(name)
