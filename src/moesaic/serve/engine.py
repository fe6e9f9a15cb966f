"""The engine: requests in, tokens out, one forward pass a step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.adapters.pool import AdapterPool, Prepared
from moesaic.errors import ConfigError, UsageError
from moesaic.serve.adapters import LentAdapters
from moesaic.serve.cache import make_pools, num_pages
from moesaic.serve.constraints import compile_constraint
from moesaic.serve.load import ExpertLoad
from moesaic.serve.model import context_limit, isolation, prepare
from moesaic.serve.request import EngineSettings, EngineStats, FinishReason, Output, Request, TokenLogprob
from moesaic.serve.runner import Runner
from moesaic.serve.sampling import Sampled, Sampler, SamplingState, make_state, validate
from moesaic.serve.scheduler import Chunk, Scheduler
from moesaic.serve.sequence import Sequence
from moesaic.serve.text import TextStream
from moesaic.serve.vocabulary import Vocabulary


@dataclass(eq=False)
class _Continuation:
    """One of a request's n continuations."""

    flight: _Flight
    index: int
    sequence: Sequence
    state: SamplingState
    text: TextStream


@dataclass(eq=False)
class _Flight:
    """A request on its way."""

    request: Request
    adapter: int
    root: Hashable
    open: dict[int, _Continuation] = field(default_factory=dict)
    cached: int | None = None


class Engine:
    """Continues many prompts at once: continuous batching over a paged KV cache, one forward pass a step.

    It has no thread and no clock: whoever owns it calls :meth:`step` while :attr:`has_work`. All calls come from one
    thread.

    Args:
        model: on its device, in eval mode, as :func:`moesaic.hf.load.load_model` returns it. Its attention belongs to
            the engine from here on: the model's own ``generate`` does not work any more.
        adapters: the pool of the model's adapters, where requests may name one.

    Raises:
        UnsupportedError: where the model's layers keep something else than keys and values, or it cannot be isolated.
        ConfigError: where settings do not go together, or with the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EngineSettings | None = None,
        adapters: AdapterPool | None = None,
    ) -> None:
        self.settings = settings or EngineSettings()
        self.tokenizer = tokenizer
        _check(self.settings)
        context = context_limit(model, self.settings.max_context)
        layers = prepare(model, context)
        page_size, max_batch = self.settings.page_size, self.settings.max_batch
        pages = num_pages(layers, page_size, self.settings.kv_bytes, max_batch, context)
        self._scheduler = Scheduler(pages, page_size, max_batch, self.settings.token_budget)
        # The last token of a request is never computed.
        self._room = pages * page_size + 1
        if self.settings.max_context is not None and self._room < context:
            raise ConfigError(
                f"the KV cache has room for {self._room} tokens, too few for one request of max_context = {context}: "
                "give it more bytes (kv_bytes), or max_context fewer tokens"
            )
        self.max_context = min(context, self._room)
        pools = make_pools(layers, pages, page_size)
        around = isolation(model, layers, page_size, self.settings.isolate)
        self._runner = Runner(model, pools, page_size, adapters, around)
        self._vocabulary = Vocabulary.of(model, tokenizer)
        self._sampler = Sampler()
        self._adapters = LentAdapters(adapters, self._before_unload)
        self._load = ExpertLoad(model)
        self._flights: dict[str, _Flight] = {}
        self._continuations: dict[Sequence, _Continuation] = {}
        self._outputs: list[Output] = []
        self._arrivals = 0
        # Ids of the requests that the last step computed something of.
        self.computing: tuple[str, ...] = ()
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "cached_tokens", "generated_tokens", "finished"), 0)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._outputs)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UnknownAdapterError: where its adapter is not loaded.
            UsageError: for anything else about it that cannot be done; nothing of it is queued then.
        """
        params = request.sampling
        limit = self._checked_limit(request)
        # Before the adapter is borrowed: a schema may be impossible.
        states = [make_state(params, request.prompt_ids, self._vocabulary, index) for index in range(params.n)]
        adapter, root = self._adapters.borrow(request.adapter)
        if not self.settings.prefix_sharing:
            root = (request.id, self._arrivals)
        flight = _Flight(request, adapter, root)
        prompt = np.asarray(request.prompt_ids, np.int64)
        sequences = [Sequence((self._arrivals, index), prompt, root, limit) for index in range(params.n)]
        for index, (sequence, state) in enumerate(zip(sequences, states, strict=True)):
            text = TextStream(self.tokenizer, params.stop, request.prompt_ids, params.min_tokens)
            flight.open[index] = _Continuation(flight, index, sequence, state, text)
            self._continuations[sequence] = flight.open[index]
        self._arrivals += 1
        self._flights[request.id] = flight
        self._scheduler.add(sequences)
        self._counts["prompt_tokens"] += len(prompt)

    def check(self, request: Request) -> None:
        """Raise what :meth:`add` would say against a request, but for its adapter; nothing is queued."""
        self._checked_limit(request)
        compile_constraint(request.sampling, self._vocabulary)

    def cancel(self, request_id: str) -> None:
        """Drop a request; the next step says so for each of its continuations. Unknown ids are ignored."""
        flight = self._flights.get(request_id)
        for continuation in list(flight.open.values()) if flight else ():
            self._outputs.append(self._end(continuation, (), "", (), "cancelled"))

    def step(self) -> list[Output]:
        """Compute one forward pass at most, and say what came of it; ``[]`` where there is nothing to do.

        Where it raises, running requests are back in the queue, and nothing that was half computed is kept: it may be
        called again. :attr:`computing` then says whose step it was.
        """
        outputs, self._outputs = self._outputs, []
        self.computing = ()
        chunks = self._scheduler.schedule()
        if not chunks:
            return outputs
        self.computing = tuple({self._continuations[chunk.sequence].flight.request.id: None for chunk in chunks})
        try:
            self._compute(chunks, outputs)
        except BaseException:
            self._scheduler.preempt_all()
            self._outputs = outputs
            raise
        self._counts["steps"] += 1
        return outputs

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter; its slots go back when its last request has ended.

        Raises:
            UnknownAdapterError: where it is not loaded.
        """
        self._adapters.unload(name)

    def publish_adapter(self, prepared: Prepared) -> None:
        """Let requests use an adapter from now on, which the pool has prepared."""
        self._load.fold()
        self._adapters.publish(prepared)

    def stats(self) -> EngineStats:
        """A look at the engine between two steps."""
        pool = self._scheduler.pool
        memory = None if self._adapters.pool is None else self._adapters.pool.memory()
        return EngineStats(
            **self._counts,
            preemptions=self._scheduler.preemptions,
            waiting=self._scheduler.num_waiting,
            running=len(self._scheduler.running),
            pages_total=pool.total,
            pages_used=pool.used,
            pages_cached=pool.cached,
            expert_load=self._load.by_layer(),
            adapters=dict(self._adapters.users),
            slots_used=sum(memory.slots_used) if memory else 0,
            slots_total=sum(memory.slots_total) if memory else 0,
        )

    def _checked_limit(self, request: Request) -> int:
        """Tokens that a request may have in the end."""
        validate(request.sampling, self._vocabulary.size)
        size, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if request.id in self._flights:
            raise UsageError(f"there is a request {request.id!r} already")
        if not size:
            raise UsageError("the prompt has no tokens: it must have one at least")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._vocabulary.size:
            raise UsageError(f"the prompt has a token that is not among the model's 0 to {self._vocabulary.size - 1}")
        if size + (wanted or 1) > self.max_context:
            asked = "one new token at least is wanted" if wanted is None else f"max_tokens is {wanted}"
            what = "the KV cache's pages" if self.max_context == self._room else "the context"
            raise UsageError(
                f"the prompt has {size} tokens and {asked}: together they may have at most {self.max_context}, {what}"
            )
        return self.max_context if wanted is None else size + wanted

    def _compute(self, chunks: list[Chunk], outputs: list[Output]) -> None:
        continuations = [self._continuations[chunk.sequence] for chunk in chunks]
        logits_NV = self._runner.run(chunks, [each.flight.adapter for each in continuations])
        self._load.add()
        ready = [each for each, chunk in zip(continuations, chunks, strict=True) if chunk.last]
        if ready:
            sampled = self._sampler.sample(logits_NV, [each.state for each in ready])
            for each, token in zip(ready, sampled, strict=True):
                outputs.append(self._extend(each, token))

    def _extend(self, continuation: _Continuation, sampled: Sampled) -> Output:
        """Add the token that was chosen for a continuation, and see whether it ends with it."""
        params, sequence, state = continuation.flight.request.sampling, continuation.sequence, continuation.state
        token = sampled.token
        sequence.append(token)
        state.output_ids.append(token)
        self._counts["generated_tokens"] += 1
        complete = state.accept(token)
        ended = token in params.stop_token_ids or (token in self._vocabulary.end_ids and not params.ignore_eos)
        ended = ended and len(state.output_ids) >= params.min_tokens
        text = "" if ended else continuation.text.push([token])
        told = () if params.logprobs is None else (TokenLogprob(token, sampled.logprob, tuple(sampled.top)),)
        reason: FinishReason | None = "stop" if ended or continuation.text.stopped else complete
        if reason is None and sequence.length >= sequence.limit:
            reason = "length"
        if reason is None:
            return self._output(continuation, (token,), text, told, None)
        if not continuation.text.stopped:
            text += continuation.text.finish()
        return self._end(continuation, (token,), text, told, reason)

    def _end(
        self,
        continuation: _Continuation,
        tokens: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason,
    ) -> Output:
        """Let go of all that a continuation holds."""
        flight = continuation.flight
        output = self._output(continuation, tokens, text, logprobs, reason)
        self._scheduler.remove(continuation.sequence)
        del self._continuations[continuation.sequence], flight.open[continuation.index]
        if not flight.open:
            del self._flights[flight.request.id]
            self._counts["finished"] += reason != "cancelled"
            if not self.settings.prefix_sharing:
                self._scheduler.tree.forget(flight.root)
            self._adapters.give_back(flight.request.adapter)
        return output

    def _output(
        self,
        continuation: _Continuation,
        tokens: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
    ) -> Output:
        flight = continuation.flight
        if flight.cached is None:
            flight.cached = flight.open[0].sequence.cached if 0 in flight.open else 0
            self._counts["cached_tokens"] += flight.cached or 0
        return Output(
            flight.request.id,
            continuation.index,
            tokens,
            text,
            logprobs,
            reason,
            prompt_tokens=len(flight.request.prompt_ids),
            cached_tokens=flight.cached or 0,
        )

    def _before_unload(self, root: Hashable) -> None:
        self._load.fold()
        self._scheduler.tree.forget(root)


def _check(settings: EngineSettings) -> None:
    for name in ("page_size", "max_batch", "token_budget"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}: it must be at least 1")
