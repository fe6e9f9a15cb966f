"""What OpenAI's API answers: whole replies, and the pieces of a stream, made from the engine's outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, model_serializer

from moesaic.serve.openai import ChatBody, GenerationBody
from moesaic.serve.request import FinishReason, Output, Request, TokenLogprob

TokenBytes = Callable[[int], bytes]
"""A token's part of the text; see :func:`moesaic.serve.text.token_bytes`."""


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompt were found in the prefix tree."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a reply."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens; ``text_offset`` counts characters of the completion."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    """One continuation of one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answer of ``/v1/completions``, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopLogprob):
    """A token of a chat's answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat's tokens."""

    content: list[ChatToken]


class ChatAnswer(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class Chat(BaseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatDelta(BaseModel):
    """What an event adds to an answer; fields without a value are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _said(self) -> dict[str, str]:
        return {name: value for name in ("role", "content") if (value := getattr(self, name)) is not None}


class ChatChunkChoice(BaseModel):
    """What an event adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of the stream of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


@dataclass
class _Choice:
    """What has come of one continuation so far."""

    text: list[str] = field(default_factory=list)
    offset: int = 0
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Reply:
    """The answer to one body, in the making.

    Args:
        requests: those of :func:`~moesaic.serve.openai.requests_of`; their outputs are given to :meth:`add`.
        reply_id: ``cmpl-...`` or ``chatcmpl-...``.
        token_bytes: the tokenizer's, for the names of tokens beside log-probabilities.
    """

    def __init__(
        self, body: GenerationBody, requests: Sequence[Request], *, reply_id: str, token_bytes: TokenBytes
    ) -> None:
        self.is_chat = isinstance(body, ChatBody)
        self.id, self.model, self.created = reply_id, body.model, int(time.time())
        self._with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._with_logprobs = body.logprob_count() is not None
        self._token_bytes = token_bytes
        n = requests[0].sampling.n
        self._first = {request.id: place * n for place, request in enumerate(requests)}
        self._choices = [_Choice() for _ in range(len(requests) * n)]
        self._cached = dict.fromkeys(self._first, 0)
        self._prompt_tokens = sum(len(request.prompt_ids) for request in requests)

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return all(choice.finish_reason is not None for choice in self._choices)

    def take(self, output: Output) -> int:
        """Take in an output; the choice that it belongs to."""
        index = self._first[output.request_id] + output.index
        choice = self._choices[index]
        choice.text.append(output.text)
        choice.tokens += len(output.token_ids)
        choice.logprobs += output.logprobs
        choice.finish_reason = output.finish_reason
        self._cached[output.request_id] = max(self._cached[output.request_id], output.cached_tokens)
        return index

    def add(self, output: Output) -> Completion | ChatChunk:
        """Take in an output; the event that a stream sends for it."""
        index = self.take(output)
        if self.is_chat:
            return self._chat_chunk(
                ChatChunkChoice(
                    index=index,
                    delta=ChatDelta(content=output.text),
                    logprobs=self._chat_logprobs(output.logprobs),
                    finish_reason=output.finish_reason,
                )
            )
        choice = self._choices[index]
        offset = choice.offset
        choice.offset += sum(len(self._name(one.token)) for one in output.logprobs)
        return self._completion([self._completion_choice(index, output.text, output.logprobs, offset)])

    def opening(self) -> list[ChatChunk]:
        """The events that begin a stream: a chat says who speaks, a completion nothing."""
        if not self.is_chat:
            return []
        delta = ChatDelta(role="assistant", content="")
        return [self._chat_chunk(ChatChunkChoice(index=index, delta=delta)) for index in range(len(self._choices))]

    def closing(self) -> list[Completion | ChatChunk]:
        """The events that end a stream: the count of tokens, where it was asked for."""
        if not self._with_usage:
            return []
        last = self._chat_chunk() if self.is_chat else self._completion([])
        last.usage = self.usage()
        return [last]

    def whole(self) -> Completion | Chat:
        """All that has come so far, as the answer without a stream."""
        texts = ["".join(choice.text) for choice in self._choices]
        if not self.is_chat:
            pairs = zip(texts, self._choices, strict=True)
            choices = [self._completion_choice(index, text, c.logprobs, 0) for index, (text, c) in enumerate(pairs)]
            reply = self._completion(choices)
            reply.usage = self.usage()
            return reply
        answers = [
            ChatChoice(
                index=index,
                message=ChatAnswer(content=text),
                logprobs=self._chat_logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
            )
            for index, (text, choice) in enumerate(zip(texts, self._choices, strict=True))
        ]
        return Chat(id=self.id, created=self.created, model=self.model, choices=answers, usage=self.usage())

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many continuations it has."""
        new = sum(choice.tokens for choice in self._choices)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=new,
            total_tokens=self._prompt_tokens + new,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices)

    def _chat_chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=list(choices))

    def _completion_choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], offset: int
    ) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._completion_logprobs(logprobs, offset),
            finish_reason=self._choices[index].finish_reason,
        )

    def _completion_logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        tokens = [self._name(one.token) for one in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return CompletionLogprobs(
            text_offset=offsets,
            tokens=tokens,
            token_logprobs=[one.logprob for one in logprobs],
            # OpenAI names the chosen token in any case.
            top_logprobs=[
                {self._name(token): value for token, value in (*one.top, (one.token, one.logprob))} for one in logprobs
            ],
        )

    def _chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(
            content=[
                ChatToken(
                    **self._chat_token(one.token, one.logprob).model_dump(),
                    top_logprobs=[self._chat_token(token, value) for token, value in one.top],
                )
                for one in logprobs
            ]
        )

    def _chat_token(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self._name(token), logprob=logprob, bytes=list(self._token_bytes(token)))

    def _name(self, token: int) -> str:
        """A token as OpenAI writes it: its text, or its bytes where they are no whole characters."""
        written = self._token_bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
