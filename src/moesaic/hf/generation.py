"""Text from a prompt: sampling settings, streaming, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from moesaic.errors import ConfigError, DataError

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
    """What :func:`generate` made; ``seconds`` covers prompt and new tokens, ``finish_reason`` is "stop" or "length"."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    seconds: float


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    *,
    chat: bool = False,
    on_text: Callable[[str], object] | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        chat: take the prompt as a user's message and format it by the tokenizer's chat template.
        on_text: called with each piece of new text as soon as it is whole.

    Raises:
        DataError: for a prompt without tokens, or one that leaves no room in the model's context.
        ConfigError: for ``chat`` where the tokenizer has no chat template.
    """
    ids_1S = _encode(tokenizer, prompt, chat).to(model.device)
    prompt_tokens = ids_1S.shape[1]
    max_new_tokens = _length(model, prompt_tokens, sampling.max_new_tokens)
    set_seed(sampling.seed)
    start = time.perf_counter()
    with torch.inference_mode(), _own_generation_config(model):
        output = model.generate(  # type: ignore[operator]
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            streamer=_Streamer(tokenizer, on_text) if on_text else None,
            pad_token_id=_first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
            max_new_tokens=max_new_tokens,
            **sampling.arguments(),
        )
    seconds = time.perf_counter() - start
    new_ids = output[0, prompt_tokens:].tolist()
    return Generated(
        prompt=prompt,
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new_ids),
        finish_reason="stop" if new_ids and new_ids[-1] in _end_ids(model) else "length",
        seconds=seconds,
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


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Tensor:
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("--chat needs a tokenizer with a chat template, and this model's has none")
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        # A language model continues something: where there is no text, the token that stands before any text.
        start = _first(tokenizer.bos_token_id, tokenizer.eos_token_id)
        if start is None:
            raise DataError("the prompt is empty, and this model's tokenizer has no token that starts a text")
        ids = [start]
    return torch.tensor([ids])


def _end_ids(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
