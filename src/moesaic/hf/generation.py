"""Text from a prompt: sampling settings, streaming, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from moesaic.errors import ConfigError, DataError
from moesaic.hf.causality import refuse_generation
from moesaic.hf.rewiring import Rewired, Rewirer, Rewiring

_DEFAULT_LENGTH = 128
_FACTS = ("bos_token_id", "eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: None for 128, or as many as the model's context has room for after the prompt.
        temperature: 0 takes the most probable token; top_k: 0 for no limit; top_p in (0, 1]; min_p in [0, 1).
        repetition_penalty: 1 for none, above 1 to discourage tokens that stand in the text already.

    Raises:
        ConfigError: for a value out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is no limit)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ]
        for name, good, allowed in checks:
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")

    def arguments(self) -> dict[str, Any]:
        """The same as keywords of transformers' ``generate``."""
        arguments: dict[str, Any] = {"do_sample": self.temperature > 0, "repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            arguments |= {"min_p": self.min_p} if self.min_p else {}
        return arguments


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` made; ``seconds`` covers prompt and new tokens, ``finish_reason`` is "stop" or "length".

    ``rewired`` is what each optimization of the routing did; None without ``rewire``.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    seconds: float
    rewired: list[Rewired] | None = None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    *,
    chat: bool = False,
    on_text: Callable[[str], object] | None = None,
    rewire: Rewiring | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        chat: take the prompt as a user's message and format it by the tokenizer's chat template.
        on_text: called with each piece of new text as soon as it is whole.
        rewire: let the routers adapt to the prompt, and to the text as it grows (:mod:`moesaic.hf.rewiring`).

    Raises:
        DataError: for a prompt without tokens, or one that leaves no room in the model's context.
        ConfigError: for ``chat`` where the tokenizer has no chat template.
        UnsupportedError: for a model with a router that looks at later tokens, or one that cannot be rewired.
    """
    refuse_generation(model)
    message = {"role": "user", "content": prompt}
    ids = chat_ids(tokenizer, [message]) if chat else prompt_ids(tokenizer, prompt)
    ids_1S = torch.tensor([ids], device=model.device)
    prompt_tokens = ids_1S.shape[1]
    max_new_tokens = _length(model, prompt_tokens, sampling.max_new_tokens)
    arguments = sampling.arguments() | {
        "streamer": _Streamer(tokenizer, on_text) if on_text else None,
        "pad_token_id": _first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
        "max_new_tokens": max_new_tokens,
    }
    set_seed(sampling.seed)
    start = time.perf_counter()
    ends, rewired = end_ids(model), None
    with _own_generation_config(model):
        if rewire is not None:
            output, rewired = _generate_rewired(model, ids_1S, rewire, ends=ends, **arguments)
        else:
            with torch.inference_mode():
                output = model.generate(  # type: ignore[operator]
                    ids_1S, attention_mask=torch.ones_like(ids_1S), **arguments
                )
    seconds = time.perf_counter() - start
    new_ids = output[0, prompt_tokens:].tolist()
    return Generated(
        prompt=prompt,
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new_ids),
        finish_reason="stop" if new_ids and new_ids[-1] in ends else "length",
        seconds=seconds,
        rewired=rewired,
    )


def _length(model: PreTrainedModel, prompt_tokens: int, wanted: int | None) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return wanted or _DEFAULT_LENGTH
    room = context - prompt_tokens
    if room < (wanted or 1):
        asked = "one new token at least" if wanted is None else f"max_new_tokens is {wanted}"
        raise DataError(
            f"the prompt has {prompt_tokens} tokens and {asked}: "
            f"together they may have at most {context}, the model's context"
        )
    return wanted or min(_DEFAULT_LENGTH, room)


@contextmanager
def _own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Of the model's generation_config only what is a fact of the model.

    transformers takes whatever a call does not say from there: beams, penalties, several sequences, that our settings
    promise not to be.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(before, name, None) for name in _FACTS})
    try:
        yield
    finally:
        model.generation_config = before


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a text to be continued, with what the tokenizer puts before any text.

    Raises:
        DataError: for a text without tokens, where the tokenizer has no token that starts a text.
    """
    if ids := list(tokenizer(prompt)["input_ids"]):
        return ids
    # A language model continues something: where there is no text, the token that stands before any text.
    start = _first(tokenizer.bos_token_id, tokenizer.eos_token_id)
    if start is None:
        raise DataError("the prompt is empty, and this model's tokenizer has no token that starts a text")
    return [start]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template, up to where the assistant's answer begins.

    Raises:
        ConfigError: where the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ConfigError("a chat needs a tokenizer with a chat template, and this model's has none")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the model author's program
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def end_ids(model: PreTrainedModel) -> list[int]:
    """The token ids after which the model has no more to say; [] where it names none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _generate_rewired(
    model: PreTrainedModel,
    ids_1S: torch.Tensor,
    settings: Rewiring,
    max_new_tokens: int,
    ends: Sequence[int],
    streamer: Any = None,
    **arguments: Any,
) -> tuple[torch.Tensor, list[Rewired]]:
    """``model.generate`` with an optimization before the first token and after each ``settings.interval`` new ones.

    Args:
        ends: the token ids that end a text. arguments: of ``model.generate``.

    Returns:
        ``[1, S + new]``, and what each optimization did.
    """
    optimizations = []
    stop = ids_1S.shape[1] + max_new_tokens
    stream = None if streamer is None else _Pieces(streamer)
    with Rewirer(model, settings) as rewirer:
        while ids_1S.shape[1] < stop:
            optimizations.append(rewirer.optimize(ids_1S))
            left = stop - ids_1S.shape[1]
            with torch.inference_mode():
                ids_1S = model.generate(  # type: ignore[operator]
                    ids_1S,
                    attention_mask=torch.ones_like(ids_1S),
                    streamer=stream,
                    max_new_tokens=min(settings.interval, left) if settings.interval else left,
                    **arguments,
                )
            if int(ids_1S[0, -1]) in ends:
                break
    if stream is not None:
        stream.close()
    return ids_1S, optimizations


class _Pieces:
    """A streamer of several calls of ``generate`` as of one: the prompts of later calls were streamed already."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self._calls = 0
        self._starts = True

    def put(self, value: torch.Tensor) -> None:
        if self._starts and self._calls:
            self._starts = False
            return
        self._starts = False
        self.streamer.put(value)

    def end(self) -> None:
        self._calls += 1
        self._starts = True

    def close(self) -> None:
        self.streamer.end()
