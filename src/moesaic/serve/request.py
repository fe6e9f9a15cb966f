"""What is asked of the engine, and what it answers: plain values, no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moesaic.errors import UsageError

FinishReason = Literal["stop", "length", "cancelled"]


class UnknownAdapterError(UsageError):
    """A request names an adapter that is not loaded; the message lists those that are."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the defaults sample from the model's own distribution.

    Attributes:
        max_tokens: new tokens at most; None: as many as the context leaves.
        temperature: 0 takes the most probable token.
        top_k: 0 keeps all. top_p: smallest set of tokens with this probability. min_p: relative to the best token's.
        repetition_penalty: divides the logits of tokens seen in prompt and output (CTRL, section 4.1).
        presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once and per occurrence.
        logit_bias: token id to what is added to its logit.
        seed: None: drawn by whoever makes the request; the n-th of several continuations uses ``seed + n``.
        stop: strings that end the text, which is cut before them. stop_token_ids: beside the model's own end tokens.
        ignore_eos: go on after an end token. min_tokens: no end before that many.
        logprobs: None: none are reported; else the chosen token's and those of this many most probable ones.
        n: continuations of the same prompt.
        json_schema, regex, grammar: at most one: the text is made to match it (grammar: Lark, as llguidance reads it).
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        id: unique among the requests in flight.
        adapter: the name of a loaded adapter; None: the base model.
    """

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()
    adapter: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, with its log-probability before temperature and filters; and the most probable ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step added to one continuation of a request.

    Attributes:
        index: which of the request's n continuations.
        token_ids: new ones. text: new text, whole characters only; a possible beginning of a stop string is held back.
        logprobs: one per new token, where asked for.
        finish_reason: None while it goes on.
        prompt_tokens, cached_tokens: of the request; cached ones were found in the prefix tree.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineSettings:
    """Sizes and habits of an engine.

    Attributes:
        page_size: tokens of a page of the KV cache. kv_bytes: of all pages; None: a quarter of the free memory, but not
            more than ``max_batch`` requests of full length need.
        max_batch: sequences that run at once. token_budget: tokens of one forward pass at most; decodes come first, and
            prompts fill what is left in chunks.
        max_context: tokens of prompt and output; None: the model's own limit.
        prefix_sharing: keep finished pages in a tree, and begin prompts from them.
        isolate: make a request's numbers independent of its batch, bit for bit; None: where the model computes in
            float32 on a CPU with the native kernels.
    """

    page_size: int = 16
    kv_bytes: int | None = None
    max_batch: int = 64
    token_budget: int = 512
    max_context: int | None = None
    prefix_sharing: bool = True
    isolate: bool | None = None


@dataclass(frozen=True)
class EngineStats:
    """A look at an engine between two steps.

    Attributes:
        steps, prompt_tokens, cached_tokens, generated_tokens, preemptions, finished: since the start.
        waiting, running: requests' sequences now.
        pages_total, pages_used, pages_cached: of the KV cache; cached ones are free for the taking.
        expert_load: by layer (module path), rows per expert of the base model since the start; adapter copies of an
            expert count as that expert.
        adapters: name to sequences in flight.
        slots_used, slots_total: expert slots of all layers that hold adapter experts, and all beyond the base's.
    """

    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    finished: int
    waiting: int
    running: int
    pages_total: int
    pages_used: int
    pages_cached: int
    expert_load: Mapping[str, Sequence[int]]
    adapters: Mapping[str, int]
    slots_used: int
    slots_total: int
