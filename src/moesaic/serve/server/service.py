"""What stands between the HTTP routes and the engine: who may come in, who waits for what, and the state of it all."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from moesaic.serve.constraints import compile_constraint
from moesaic.serve.openai import ChatBody, CompletionBody, GenerationBody, requests_of, within
from moesaic.serve.replies import Reply, TokenBytes
from moesaic.serve.request import EngineStats, Output, Request
from moesaic.serve.sampling import validate
from moesaic.serve.server.adapters import Adapters, Pool
from moesaic.serve.server.errors import ApiError
from moesaic.serve.server.inbox import Inbox
from moesaic.serve.server.loop import EngineCore, EngineFailure, EngineLoop
from moesaic.serve.server.metrics import Metrics
from moesaic.serve.server.settings import ServerSettings
from moesaic.serve.server.stats import (
    AdapterUse,
    ExpertLoad,
    Gauge,
    Pages,
    Sequences,
    Slots,
    State,
    Stats,
    Tokens,
)
from moesaic.serve.vocabulary import Vocabulary

log = logging.getLogger("moesaic.serve")

_CLOSED = {
    "loading": "the model is still loading",
    "draining": "the server is shutting down",
    "failed": "the engine has failed: the server must be restarted",
}


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be served.

    Attributes:
        tokenizer: the server's own copy; the engine has another one, on another thread.
        vocabulary: the engine's, for compiling schemas.
        max_context: tokens of prompt and output together.
        adapters: those that ``pool`` holds from the start.
    """

    engine: EngineCore
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    token_bytes: TokenBytes
    max_context: int
    page_size: int = 16
    pool: Pool | None = None
    adapters: dict[str, Path] = field(default_factory=dict)


class Service:
    """A server's inside; all of it lives on the event loop, and listens to the engine's thread.

    Args:
        build: loads the model; called on the engine's thread.
        on_change: called when the state has changed.
    """

    def __init__(
        self,
        settings: ServerSettings,
        build: Callable[[], Loaded],
        on_change: Callable[[Service], None] = lambda service: None,
    ) -> None:
        self.settings = settings
        self.state: State = "loading"
        self.load_error: BaseException | None = None
        self.gauge = Gauge()
        self.metrics = Metrics(self.gauge)
        self.loop = EngineLoop(build, self)
        self.loaded: Loaded | None = None
        self._on_change = on_change
        self._adapters: Adapters | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._sequences = 0
        self._mean_seconds = 1.0
        self.created = int(time.time())
        # One thread: a tokenizer cannot bear several at once. Schemas have their own, for one may take a second.
        self._reader = ThreadPoolExecutor(1, "moesaic-text")
        self._compiler = ThreadPoolExecutor(1, "moesaic-schemas")

    def start(self) -> None:
        """Begin to load the model."""
        self.loop.start(asyncio.get_running_loop())

    def stop(self) -> None:
        """Ask the engine's thread to end."""
        self.loop.stop()
        for threads in (self._reader, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._adapters is not None:
            self._adapters.close()

    def drain(self) -> None:
        """Let nothing new in; what is in flight may take ``drain_seconds`` more."""
        if self.state != "failed":
            self._become("draining")
        end = ApiError(503, "the server was shut down before the answer was complete", code="draining")
        # Whose requests are in flight is asked then, not now: some are still being read.
        asyncio.get_running_loop().call_later(self.settings.drain_seconds, lambda: self._fail(list(self._inboxes), end))

    @property
    def adapters(self) -> Adapters:
        """Raises ApiError 503 where the server is not open."""
        self._open()
        assert self._adapters is not None
        return self._adapters

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's ``model`` names; None: the base model.

        Raises:
            ApiError: 404 with the known names, 503 where the server is not open.
        """
        names = self.adapters.names()
        if model == self.settings.name:
            return None
        if model not in names:
            known = ", ".join([self.settings.name, *names])
            raise ApiError(404, f"there is no model {model!r}; served: {known}", param="model", code="model_not_found")
        return model

    def admit(self, body: GenerationBody) -> Inbox:
        """Keep room for what a body asks for, until :meth:`close`.

        Raises:
            ApiError: 400 where it is too much in any case, 429 where it is now.
        """
        sequences = _prompts(body) * (body.n or 1)
        most = self.settings.max_sequences
        if sequences > most:
            raise ApiError(400, f"prompts times n is {sequences}: this server takes at most {most}", param="n")
        if self._sequences + sequences > most:
            wait = min(60, max(1, math.ceil(self._mean_seconds)))
            raise ApiError(
                429,
                f"the queue is full: {self._sequences} of {most} sequences; try again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self._sequences += sequences
        return Inbox(sequences, whole=not body.stream)

    async def send(self, inbox: Inbox, body: GenerationBody) -> Reply:
        """Give the engine what a body asks for; its outputs come into ``inbox``.

        Raises:
            ApiError, UsageError: where the body asks for what cannot be; nothing is in flight then.
        """
        adapter = self.adapter_of(body.model)
        assert self.loaded is not None
        reply_id = f"{'chatcmpl' if isinstance(body, ChatBody) else 'cmpl'}-{uuid4().hex}"
        now = asyncio.get_running_loop()
        requests = await now.run_in_executor(self._reader, self._read, body, reply_id, adapter)
        sampling = requests[0].sampling
        if sampling.json_schema or sampling.regex or sampling.grammar:
            validate(sampling, self.loaded.vocabulary.size)
            # The engine finds it in a cache then, and no step waits for it.
            await now.run_in_executor(self._compiler, compile_constraint, sampling, self.loaded.vocabulary)
        inbox.expect(requests)
        self._inboxes.update(dict.fromkeys(inbox.request_ids, inbox))
        await self.loop.add(requests)
        return Reply(body, requests, reply_id=reply_id, token_bytes=self.loaded.token_bytes)

    def close(self, inbox: Inbox) -> None:
        """The client has its answer, or has left: what still runs for it ends."""
        self._sequences -= inbox.sequences
        known = [self._inboxes.pop(request_id, None) for request_id in inbox.request_ids]
        if any(known) and not inbox.done:
            self.loop.cancel(inbox.request_ids)

    def stats(self) -> Stats:
        """What the server does now."""
        engine, loaded, settings = self.gauge.engine, self.loaded, self.settings
        adapters = self._adapters.all() if self._adapters is not None else []
        return Stats(
            model=settings.name,
            state=self.state,
            uptime=self.gauge.uptime,
            chat=bool(loaded and loaded.tokenizer.chat_template),
            max_context=loaded.max_context if loaded else 0,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            steps=engine.steps,
            preemptions=engine.preemptions,
            requests=Sequences(running=engine.running, waiting=engine.waiting, finished=engine.finished),
            tokens=Tokens(prompt=engine.prompt_tokens, cached=engine.cached_tokens, generated=engine.generated_tokens),
            rates=self.gauge.rates(),
            pages=Pages(
                total=engine.pages_total,
                used=engine.pages_used,
                cached=engine.pages_cached,
                size=loaded.page_size if loaded else 0,
            ),
            slots=Slots(used=engine.slots_used, total=engine.slots_total),
            adapters=[AdapterUse(name=a.name, running=engine.adapters.get(a.name, 0), state=a.state) for a in adapters],
            experts=[ExpertLoad(layer=layer, load=list(load)) for layer, load in engine.expert_load.items()],
        )

    # What the engine's thread tells.

    def on_loaded(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._adapters = Adapters(self.settings, self.loop, loaded.pool, loaded.adapters)
        if self.state == "loading":
            self._become("ready")

    def on_load_failed(self, error: BaseException) -> None:
        self.load_error = error
        self._become("failed")

    def on_step(self, outputs: Sequence[Output], at: float, stats: EngineStats | None) -> None:
        for output in outputs:
            if (inbox := self._inboxes.get(output.request_id)) is None:
                continue
            if output.token_ids:
                place = (output.request_id, output.index)
                before = inbox.last_token.get(place)
                if before is None:
                    self.metrics.first_token.observe(at - inbox.arrived)
                else:
                    self.metrics.between_tokens.observe(at - before)
                inbox.last_token[place] = at
            inbox.put(output)
            if inbox.done:
                seconds = at - inbox.arrived
                self.metrics.request.observe(seconds)
                self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        if stats is not None:
            self.gauge.see(stats)
            if self._adapters is not None:
                self._adapters.settle()

    def on_failure(self, request_ids: Sequence[str], beyond_repair: bool) -> None:
        if beyond_repair:
            self._become("failed")
        lost = list(self._inboxes) if beyond_repair else request_ids
        self._fail(lost, EngineFailure("the engine failed while it computed this; the server's log says more"))

    def _fail(self, request_ids: Sequence[str], error: Exception) -> None:
        for inbox in {id(inbox): inbox for name in request_ids if (inbox := self._inboxes.get(name))}.values():
            inbox.fail(error)

    def _open(self) -> None:
        if self.state != "ready":
            raise ApiError(503, _CLOSED[self.state], code=self.state, headers={"Retry-After": "5"})

    def _become(self, state: State) -> None:
        self.state = state
        self._on_change(self)

    def _read(self, body: GenerationBody, reply_id: str, adapter: str | None) -> list[Request]:
        """The engine's requests of a body, within the limits of the settings; on the reader's thread."""
        assert self.loaded is not None
        limit, wanted = self.settings.max_tokens, body.asked_limit()
        if limit is not None and wanted is not None and wanted > limit:
            raise ApiError(400, f"max_tokens is {wanted}: this server gives at most {limit}", param="max_tokens")
        requests = requests_of(body, self.loaded.tokenizer, request_id=reply_id, adapter=adapter)
        longest = max(len(request.prompt_ids) for request in requests)
        if self.settings.max_prompt is not None and longest > self.settings.max_prompt:
            raise ApiError(
                400,
                f"a prompt has {longest} tokens: this server takes at most {self.settings.max_prompt}",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
        return within(requests, body, self.loaded.max_context, limit)


def _prompts(body: GenerationBody) -> int:
    if isinstance(body, CompletionBody) and isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        return len(body.prompt)
    return 1
