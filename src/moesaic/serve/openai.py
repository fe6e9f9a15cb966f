"""What OpenAI's API asks for, and how it becomes requests to the engine.

Field names and meanings: OpenAI's API reference, "Completions" and "Chat completions"; what goes beyond it (``top_k``,
``min_p``, ``regex``, ...) is named as vLLM names it. A field that is not here is refused rather than ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from moesaic.errors import ConfigError, did_you_mean
from moesaic.hf.generation import chat_ids, prompt_ids
from moesaic.serve.request import Request, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that does not say it; a chat goes on while there is room."""
MOST_LOGPROBS = 20
MOST_FIELDS = 100
"""Of an object; more than any has that we know."""
MOST_BIASES = 1024


def _whole(text: str) -> str:
    # JSON can spell half of a surrogate pair; a tokenizer cannot read it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is no text")
    return text


def _at_most(count: int) -> Callable[[Any], Any]:
    # pydantic notes what is wrong with every entry of an object before it looks at how many there are: of a body of
    # some megabytes that takes half a minute, in which nobody else is answered.
    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"it has {len(value)} entries, and may have at most {count}")
        return value

    return check


Str = Annotated[str, AfterValidator(_whole)]
Text = Annotated[Str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
LogitBias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """Base: unknown fields, wrong types, infinities and NaN are refused; null stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _not_endless(cls, fields: Any) -> Any:
        return _at_most(MOST_FIELDS)(fields)


class StreamOptions(Body):
    """``stream_options``: with ``include_usage`` the last event of a stream counts the tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """``response_format.json_schema``; the text always matches, whatever ``strict`` says."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """``response_format``: free text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema that the text must match; None: any text."""
        if self.type == "text":
            return None
        return _dump(self.json_schema.schema_ if self.json_schema else {"type": "object"})


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: Str = Field(description="The served model's name, or the name of an adapter.")
    max_tokens: int | None = Field(None, ge=1, description="New tokens at most.")
    n: int | None = Field(None, ge=1, le=128, description="Continuations of each prompt.")
    stream: bool | None = Field(None, description="Send the text piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token.")
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], LogitBias] | None, BeforeValidator(_at_most(MOST_BIASES))
    ] = Field(None, description=f"an object of token ids with a number from -100 to 100 each, at most {MOST_BIASES}")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same text.")
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        None, description="a string, or a list of at most 16 strings, none empty"
    )
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="Has no effect.")
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_at_most(MOST_FIELDS))] = Field(
        None, description="Has no effect."
    )
    # Beyond OpenAI's.
    top_k: int | None = Field(None, ge=0, description="Sample among the K most probable tokens; 0 for all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Leave out tokens below this share of the best one's.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Above 1 discourages repetition.")
    min_tokens: int | None = Field(None, ge=0, description="No end before that many new tokens.")
    ignore_eos: bool | None = Field(None, description="Go on after an end token.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    regex: Text | None = Field(None, description="The text must match it as a whole.")
    grammar: Text | None = Field(None, description="A Lark grammar that the text must follow.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true, and only with it")
        return self

    def asked_limit(self) -> int | None:
        """New tokens at most, as the body says it; None: it does not."""
        return self.max_tokens

    def token_limit(self) -> int | None:
        """The same, or what holds where it is not said."""
        return self.asked_limit()

    def logprob_count(self) -> int | None:
        """How many of the most probable tokens are reported at each position; None: not even the chosen one."""
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        """The same, as the engine takes it.

        Raises:
            ConfigError: for a JSON schema that is nested too deeply.
        """
        plain = [
            *["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
            *["min_tokens", "ignore_eos", "n", "regex", "grammar"],
        ]
        said = {name: value for name in plain if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            **said,
            max_tokens=self.token_limit(),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.logprob_count(),
            json_schema=self.response_format.schema_text() if self.response_format else None,
        )

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The token ids of each prompt; raises :class:`~moesaic.errors.UsageError` where there is none."""
        raise NotImplementedError


class CompletionBody(GenerationBody):
    """The body of ``POST /v1/completions``."""

    prompt: (
        Str
        | Annotated[list[Str], Field(min_length=1, max_length=2048, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
    ) = Field(description="a string, a list of strings, a list of token ids, or a list of lists of token ids")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Report this many most probable tokens.")
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def token_limit(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def logprob_count(self) -> int | None:
        return self.logprobs

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        if isinstance(self.prompt, str):
            return [prompt_ids(tokenizer, self.prompt)]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return [prompt_ids(tokenizer, one) if isinstance(one, str) else list(one) for one in self.prompt]


class TextPart(Body):
    """A piece of a message's content; only text is read."""

    type: Literal["text"]
    text: Str


class Message(Body):
    """One message of a chat. What an answer of ours holds may be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] = Field(
        description="a string, or a list of {'type': 'text', 'text': ...}"
    )
    name: str | None = Field(None, description="Has no effect.")
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    def as_template(self) -> dict[str, str]:
        """As chat templates take it; they know "developer" by its older name."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatBody(GenerationBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="And of this many most probable ones.")
    tools: None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true, and only with it")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are one setting: give one of them")
        return self

    def asked_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return [chat_ids(tokenizer, [message.as_template() for message in self.messages])]


def requests_of(
    body: GenerationBody, tokenizer: PreTrainedTokenizerBase, *, request_id: str, adapter: str | None = None
) -> list[Request]:
    """The requests that a body asks for, one per prompt; the i-th is called ``request_id`` + ``-i``.

    Args:
        adapter: the adapter that the body's ``model`` names, if it is not the base model.

    Raises:
        UsageError: where the prompt has no tokens, the tokenizer no chat template, or the schema is nested too deeply.
            Whether the settings go together, and fit the model, the engine says.
    """
    sampling = body.sampling()
    prompts = body.prompts(tokenizer)
    return [Request(f"{request_id}-{index}", ids, sampling, adapter) for index, ids in enumerate(prompts)]


def within(
    requests: Sequence[Request], body: GenerationBody, max_context: int, most: int | None = None
) -> list[Request]:
    """The same requests; where the body does not say how long an answer may be, no longer than it can be.

    Args:
        max_context: tokens of prompt and output. most: new tokens; None: as many as there is room for.
    """
    if body.asked_limit() is not None:
        return list(requests)
    limit = min((one for one in (body.token_limit(), most) if one is not None), default=max_context)
    return [
        # None is all the room that there is, be it none: the engine says that then, and not what nobody asked for.
        replace(
            one,
            sampling=replace(one.sampling, max_tokens=limit if len(one.prompt_ids) + limit <= max_context else None),
        )
        for one in requests
    ]


def complaint(errors: Sequence[Any], fields: Mapping[str, Any] | None = None) -> tuple[str | None, str]:
    """What pydantic has against a body, as (field or None, one line that names it).

    Args:
        errors: ``errors()`` of a pydantic ValidationError, or of FastAPI's, whose places begin with "body".
        fields: ``model_fields`` of the body's class: they say what a field may hold, and which fields there are.
    """
    # A misspelled name is why another one is missing.
    errors = sorted(errors, key=lambda error: error["type"] != "extra_forbidden")
    places = [list(error["loc"])[error["loc"][:1] == ("body",) :] for error in errors]
    # Of a value that is none of several types, pydantic says for each type why not: what is deepest got farthest.
    rank = [len(place) if place[:1] == places[0][:1] else -1 for place in places]
    first, place = errors[rank.index(max(rank))], places[rank.index(max(rank))]
    if first["type"] == "json_invalid":
        return None, f"the body is not JSON: {first['ctx']['error']}"
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else _lower(first["msg"])
    if not place:
        return None, reason if first["type"] == "value_error" else f"the body: {reason}"
    name = _name(place)
    field = fields.get(str(place[0])) if fields else None
    if first["type"] == "extra_forbidden":
        allowed = f": {did_you_mean(name, fields)}" if fields and len(place) == 1 else ""
        return name, f"there is no field {name!r}{allowed}"
    if first["type"] == "missing":
        return name, f"{name} is missing"
    if first["type"] == "none_required":
        return name, f"{name} is not supported"
    if field is not None and str(field.description).startswith(("a ", "an ")):
        return name, f"{place[0]} must be {field.description}"
    return name, f"{name}: {reason}"


def _name(place: Sequence[str | int]) -> str:
    """A place in a body as one would write it; without the names of types, which pydantic adds to unions."""
    name = ""
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "none"):
            name += f".{part}" if name else part
    return name


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _dump(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise ConfigError("the JSON schema is nested too deeply") from None
