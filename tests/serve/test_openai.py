"""Bodies of OpenAI's API become requests, complaints name the field, and outputs become OpenAI's replies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError
from tests.serve.tiny import byte_tokenizer

from moesaic.errors import ConfigError
from moesaic.serve.openai import ChatBody, CompletionBody, GenerationBody, complaint, requests_of, within
from moesaic.serve.replies import Reply
from moesaic.serve.request import Output, SamplingParams, TokenLogprob
from moesaic.serve.text import token_bytes

TOKENIZER = byte_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def body(**fields: Any) -> GenerationBody:
    kind = ChatBody if "messages" in fields else CompletionBody
    return kind.model_validate_json(json.dumps({"model": "m", **fields}))


def test_what_is_not_said_is_the_default() -> None:
    [request] = requests_of(body(prompt="ab", seed=1), TOKENIZER, request_id="r")
    assert (request.id, list(request.prompt_ids), request.adapter) == ("r-0", ids("ab"), None)
    assert request.sampling == SamplingParams(max_tokens=16, seed=1)
    nulls = dict.fromkeys(set(CompletionBody.model_fields) - {"model", "prompt", "seed"})
    assert body(prompt="ab", seed=1, **nulls).sampling() == request.sampling
    assert body(messages=HI, seed=1).sampling() == SamplingParams(seed=1)
    drawn = {body(prompt="ab").sampling().seed for _ in range(3)}
    assert len(drawn) == 3 and None not in drawn


def test_everything_that_is_said_arrives() -> None:
    said: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "n": 2,
        "seed": -4,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    expected = SamplingParams(
        **said, max_tokens=9, logit_bias={5: -100.0}, stop=("x", "yz"), stop_token_ids=(3,), logprobs=2, regex="a"
    )
    lists = {"logit_bias": {"5": -100}, "stop": ["x", "yz"], "stop_token_ids": [3], "regex": "a"}
    assert body(prompt="a", max_tokens=9, logprobs=2, **said, **lists).sampling() == expected
    chat = body(messages=HI, max_completion_tokens=9, logprobs=True, top_logprobs=2, **said, **lists)
    assert chat.sampling() == expected
    assert body(messages=HI, logprobs=True).sampling().logprobs == 0
    assert body(prompt="a", stop="x").sampling().stop == ("x",)
    assert body(prompt="a", grammar="start: x").sampling().grammar == "start: x"


MANY = 100_000


@pytest.mark.parametrize(
    "said",
    [
        {"prompt": [-1] * MANY},
        {"prompt": [[-1]] * MANY},
        {"prompt": [[-1] * MANY]},
        {"prompt": "a", "logit_bias": {f"x{number}": 1 for number in range(MANY)}},
        {"prompt": "a", "metadata": {f"x{number}": 1 for number in range(MANY)}},
        {"prompt": "a", **{f"x{number}": 1 for number in range(MANY)}},
        {"messages": [{"role": "x"}] * MANY},
        {"messages": [{"role": "user", "content": [1] * MANY}]},
    ],
)
def test_a_body_full_of_faults_is_not_read_to_its_end(said: dict[str, Any]) -> None:
    kind = ChatBody if "messages" in said else CompletionBody
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({"model": "m", **said})
    # Complaints are made on the server's event loop, which would stand still for as long as there are some.
    assert raised.value.error_count() < 10


@pytest.mark.parametrize(
    ("said", "most", "expected"),
    [
        ({"prompt": "a" * 30}, None, 16),
        ({"prompt": "a" * 90}, None, None),
        ({"prompt": "a" * 90}, 10, 10),
        ({"prompt": "a" * 95}, 10, None),
        ({"prompt": "a" * 30, "max_tokens": 99}, None, 99),
        ({"messages": HI}, None, None),
        ({"messages": HI}, 20, 20),
        ({"messages": [{"role": "user", "content": "a" * 80}]}, 20, None),
    ],
)
def test_what_nobody_asked_for_is_no_more_than_there_is_room(
    said: dict[str, Any], most: int | None, expected: int | None
) -> None:
    asked = body(**said)
    [request] = within(requests_of(asked, TOKENIZER, request_id="r"), asked, 100, most)
    assert request.sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"enum": ["é"]}}},
            {"enum": ["é"]},
        ),
    ],
)
def test_a_response_format_is_a_schema(wanted: dict[str, Any], schema: dict[str, Any] | None) -> None:
    told = body(prompt="a", response_format=wanted).sampling().json_schema
    assert (told and json.loads(told)) == schema


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [ids("ab")]),
        (["ab", "c"], [ids("ab"), ids("c")]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [[256]]),
    ],
)
def test_a_prompt_is_text_or_tokens_or_several(prompt: Any, expected: list[list[int]]) -> None:
    requests = requests_of(body(prompt=prompt), TOKENIZER, request_id="r", adapter="poet")
    assert [list(request.prompt_ids) for request in requests] == expected
    assert [request.id for request in requests] == [f"r-{index}" for index in range(len(expected))]
    assert {request.adapter for request in requests} == {"poet"}


def test_messages_go_through_the_template() -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": None},
    ]
    [request] = requests_of(body(messages=messages), TOKENIZER, request_id="r")
    assert list(request.prompt_ids) == ids("<system>be short<user>ab<assistant>c:")


def test_a_template_that_fails_is_told() -> None:
    other = byte_tokenizer()
    with pytest.raises(ConfigError, match="a chat needs a tokenizer with a chat template"):
        requests_of(body(messages=HI), other, request_id="r")
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="the model's chat template refuses these messages: roles must alternate"):
        requests_of(body(messages=HI), other, request_id="r")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"promt": "x"}, "promt", "there is no field 'promt': did you mean 'prompt'? allowed: best_of, "),
        (
            {"prompt": 3},
            "prompt",
            "prompt must be a string, a list of strings, a list of token ids, or a list of lists",
        ),
        ({"prompt": ["a", 1]}, "prompt[1]", "prompt must be a string, a list of strings"),
        ({"prompt": []}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": "\ud800"}, "prompt", "prompt must be a string, "),
        ({"prompt": "x", "temperature": 3}, "temperature", "temperature: input should be less than or equal to 2"),
        ({"prompt": "x", "temperature": "1"}, "temperature", "temperature: input should be a valid number"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", "temperature: input should be a finite number"),
        ({"prompt": "x", "n": True}, "n", "n: input should be a valid integer"),
        ({"prompt": "x", "n": 0}, "n", "n: input should be greater than or equal to 1"),
        ({"prompt": "x", "echo": True}, "echo", "echo: input should be False"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
        (
            {"prompt": "x", "stop": ["a", ""]},
            "stop[1]",
            "stop must be a string, or a list of at most 16 strings, none empty",
        ),
        (
            {"prompt": "x", "logit_bias": {"1": 101}},
            "logit_bias",
            "logit_bias must be an object of token ids with a number",
        ),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a", "logit_bias must be an object of token ids"),
        ({"prompt": "x", "stream_options": {}}, None, "stream_options goes with stream: true, and only with it"),
        (
            {"prompt": "x", "response_format": {"type": "json_schema"}},
            "response_format",
            "response_format: json_schema goes with type 'json_schema', and only with it",
        ),
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "messages[0].role: input should be 'system'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "messages[0].content[0].type: input should be 'text'",
        ),
        ({"messages": [{**HI[0], "x": 1}]}, "messages[0].x", "there is no field 'messages[0].x'"),
        ({"messages": HI, "tools": [{}]}, "tools", "tools is not supported"),
        ({"messages": HI, "top_logprobs": 1}, None, "top_logprobs goes with logprobs: true, and only with it"),
        (
            {"messages": HI, "max_tokens": 1, "max_completion_tokens": 2},
            None,
            "max_tokens and max_completion_tokens are one",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_complaint_names_the_field(fields: dict[str, Any], param: str | None, message: str) -> None:
    kind = ChatBody if "messages" in fields else CompletionBody
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({"model": "m", **fields})
    for place in ((), ("body",)):  # FastAPI's complaints begin with the part of the request
        errors = [{**error, "loc": (*place, *error["loc"])} for error in raised.value.errors()]
        told = complaint(errors, kind.model_fields)
        assert told[0] == param and told[1].startswith(message) and "\n" not in told[1]


def test_a_body_that_is_no_json_is_told() -> None:
    error = {
        "type": "json_invalid",
        "loc": ("body", 3),
        "msg": "JSON decode error",
        "ctx": {"error": "Expecting value"},
    }
    assert complaint([error]) == (None, "the body is not JSON: Expecting value")
    error = {"type": "model_attributes_type", "loc": ("body",), "msg": "Input should be a valid dictionary"}
    assert complaint([error]) == (None, "the body: input should be a valid dictionary")


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"not": schema}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises((ConfigError, ValidationError)):
        CompletionBody.model_validate({"model": "m", "prompt": "x", "response_format": wanted}).sampling()


# Replies.


def outputs(asked: GenerationBody) -> tuple[Reply, list[Output]]:
    """A reply of two prompts or of one twice, "é" and "ab", and the engine's outputs for it."""
    requests = requests_of(asked, TOKENIZER, request_id="r")
    reply = Reply(asked, requests, reply_id="cmpl-1", token_bytes=token_bytes(TOKENIZER))
    name = requests[-1].id
    first, second = ids("é")
    index = int(len(requests) == 1)
    told = [
        Output("r-0", 0, (first,), "", (TokenLogprob(first, -1.0, ((first, -1.0), (second, -2.0))),), None, 2, 0),
        Output(name, index, tuple(ids("a")), "a", (TokenLogprob(ids("a")[0], -0.5),), None, 2, 1),
        Output("r-0", 0, (second,), "é", (TokenLogprob(second, -3.0),), "length", 2, 0),
        Output(
            name,
            index,
            (*ids("b"), 256),
            "b",
            tuple(TokenLogprob(one, -0.25) for one in (*ids("b"), 256)),
            "stop",
            2,
            1,
        ),
    ]
    return reply, told


def test_a_whole_completion_is_as_openai_has_it() -> None:
    reply, told = outputs(body(prompt=["xy", "zw"], logprobs=2))
    for output in told:
        assert not reply.done
        reply.add(output)
    assert reply.done
    parsed = OpenAICompletion.model_validate_json(reply.whole().model_dump_json(), strict=True)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in parsed.choices] == [
        (0, "é", "length"),
        (1, "ab", "stop"),
    ]
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9"] and logprobs.token_logprobs == [-1.0, -3.0]
    assert logprobs.top_logprobs == [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}, {"bytes:\\xa9": -3.0}]
    assert parsed.choices[1].logprobs is not None and parsed.choices[1].logprobs.text_offset == [0, 1, 2]
    assert parsed.usage is not None and parsed.usage.prompt_tokens_details is not None
    usage = parsed.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 5, 9)
    assert parsed.usage.prompt_tokens_details.cached_tokens == 1


def test_the_events_of_a_completion_make_the_whole() -> None:
    asked = body(prompt=["xy", "zw"], logprobs=2, stream=True, stream_options={"include_usage": True})
    reply, told = outputs(asked)
    assert reply.opening() == []
    events = [json.loads(reply.add(output).model_dump_json()) for output in told]
    [closing] = reply.closing()
    whole = json.loads(reply.whole().model_dump_json())
    for choice in whole["choices"]:
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None, choice["finish_reason"]]
        for part in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [one for piece in pieces for one in piece["logprobs"][part]] == choice["logprobs"][part]
    last = json.loads(closing.model_dump_json())
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(event["usage"] is None and event["id"] == whole["id"] for event in events)


def test_a_chat_whole_and_in_events() -> None:
    asked = body(messages=HI, n=2, logprobs=True, top_logprobs=2, stream=True)
    reply, told = outputs(asked)
    opening = [ChatCompletionChunk.model_validate_json(event.model_dump_json()) for event in reply.opening()]
    assert [(event.choices[0].index, event.choices[0].delta.role) for event in opening] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    sent = [json.loads(reply.add(output).model_dump_json()) for output in told]
    assert sent[1]["choices"][0]["delta"] == {"content": "a"}
    events = [ChatCompletionChunk.model_validate(event) for event in sent]
    assert reply.closing() == []
    whole = ChatCompletion.model_validate_json(reply.whole().model_dump_json(), strict=True)
    assert [choice.message.content for choice in whole.choices] == ["é", "ab"]
    assert [choice.message.role for choice in whole.choices] == ["assistant", "assistant"]
    for choice in whole.choices:
        pieces = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert pieces[-1].finish_reason == choice.finish_reason
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first, second = logprobs.content
    assert bytes([*first.bytes, *second.bytes]).decode() == "é"  # type: ignore[misc]
    assert [(top.bytes, top.logprob) for top in first.top_logprobs] == [([0xC3], -1.0), ([0xA9], -2.0)]
    assert whole.usage is not None and whole.usage.prompt_tokens == len(ids("<user>hi:"))


def test_logprobs_are_left_out_where_nobody_asked() -> None:
    for asked in (body(prompt="x", n=2), body(messages=HI, n=2)):
        reply, told = outputs(asked)
        for output in told:
            assert json.loads(reply.add(output).model_dump_json())["choices"][0]["logprobs"] is None
        assert all(choice["logprobs"] is None for choice in reply.whole().model_dump()["choices"])
