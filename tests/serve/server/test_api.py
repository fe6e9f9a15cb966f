"""The API as OpenAI's own client sees it, over a real engine."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serve.server.conftest import SETTINGS
from tests.serve.server.running import Running, serving
from tests.serve.tiny import byte_tokenizer, tiny

from moesaic.serve import constraints
from moesaic.serve.server.build import load

GREEDY: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


def test_the_same_seed_gives_the_same_text(served: Running) -> None:
    client = served.client()
    texts = [
        client.completions.create(model="base", prompt="once", max_tokens=20, seed=seed).choices[0].text
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_a_completion_and_its_stream_say_the_same(served: Running) -> None:
    client = served.client()
    whole = client.completions.create(prompt=["one", "two"], n=2, seed=3, model="base", max_tokens=9, logprobs=2)
    stream = client.completions.create(
        prompt=["one", "two"], n=2, seed=3, model="base", max_tokens=9, logprobs=2,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    texts, tokens = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    *events, last = stream
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs]
    assert last.choices == []
    assert whole.usage is not None and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 36)
    assert whole.usage.completion_tokens == 36


def test_a_chat_and_its_stream_say_the_same(served: Running) -> None:
    client = served.client()
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=1, **GREEDY)
    said = whole.choices[0]
    assert whole.usage is not None and whole.usage.prompt_tokens == len(
        "<system>Be brief.<user>Who are you?<assistant>"
    )
    assert said.message.role == "assistant" and said.finish_reason == "length"
    assert said.logprobs is not None and said.logprobs.content is not None and len(said.logprobs.content) == 12
    with client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY) as stream:
        assert "".join(event.choices[0].delta.content or "" for event in stream) == said.message.content


def test_an_adapter_is_a_model_and_batches_mix(served: Running) -> None:
    client = served.client()

    def ask(model: str) -> str:
        return client.completions.create(**{**GREEDY, "model": model}, prompt="the moon").choices[0].text

    alone = {model: ask(model) for model in ("base", "poet")}
    assert alone["base"] != alone["poet"]
    with ThreadPoolExecutor(8) as threads:
        for model, text in zip(["base", "poet"] * 8, threads.map(ask, ["base", "poet"] * 8), strict=True):
            assert text == alone[model]


def test_64_at_once(served: Running) -> None:
    client = served.client()

    def ask(number: int) -> str:
        return client.completions.create(**{**GREEDY, "max_tokens": 3}, prompt=f"{number}").choices[0].text

    with ThreadPoolExecutor(64) as threads:
        together = list(threads.map(ask, range(64)))
    assert together[::16] == [ask(number) for number in range(0, 64, 16)]
    stats = served.ask("GET", "/stats")[2]
    assert stats["requests"]["running"] == stats["requests"]["waiting"] == stats["pages"]["used"] == 0


def test_a_client_that_leaves_frees_its_pages(served: Running) -> None:
    finished = served.ask("GET", "/stats")[2]["requests"]["finished"]
    stream = served.client().completions.create(**{**GREEDY, "max_tokens": 480}, prompt="x", n=4, stream=True)
    next(iter(stream))
    stream.close()
    while (stats := served.ask("GET", "/stats")[2])["requests"]["running"] or stats["pages"]["used"]:
        pass
    assert stats["requests"]["finished"] == finished  # it was cancelled


def test_a_step_that_fails_is_not_the_end(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(served.engine._runner, "run", fail)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            served.client().completions.create(**GREEDY, prompt="x")
    assert served.client().completions.create(**GREEDY, prompt="x").usage
    assert served.ask("GET", "/stats")[2]["pages"]["used"] == 0


def test_models(served: Running) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["base", "poet"]
    assert client.models.retrieve("poet").owned_by == "moesaic"


def test_text_that_must_match(served: Running) -> None:
    client = served.client()
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
    }
    answer = client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
        },
    )
    assert 0 <= json.loads(answer.choices[0].message.content or "")["n"] <= 99
    text = client.completions.create(model="base", prompt="x", extra_body={"regex": "[ab]{3}"}).choices[0].text
    assert len(text) == 3 and set(text) <= set("ab")


def test_grammars_are_compiled_beside_the_engine(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    compile_ = constraints._Compiler._compile

    def watched(self: Any, kind: str, text: str) -> Any:
        threads.append(threading.current_thread().name)
        return compile_(self, kind, text)

    monkeypatch.setattr(constraints._Compiler, "_compile", watched)
    served.client().completions.create(model="base", prompt="x", n=2, extra_body={"regex": "[cd]{3}"})
    assert [name.split("_")[0] for name in threads] == ["moesaic-schemas"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"prompt": "x" * 600}, "at most 512"),
        ({"prompt": [300]}, "0 to 287"),
        ({"prompt": "x", "max_tokens": 512}, "at most 512"),
        ({"prompt": "x", "regex": "("}, "regular expression"),
        ({"prompt": "x", "grammar": "nonsense"}, "grammar"),
        ({"prompt": "x", "min_tokens": 20, "max_tokens": 2}, "min_tokens"),
    ],
)
def test_what_cannot_be(served: Running, body: dict[str, Any], part: str) -> None:
    status, _, answer = served.ask("POST", "/v1/completions", {"model": "base", **body})
    assert status == 400
    assert part in answer["error"]["message"]


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"allOf": [{"type": "string"}, {"type": "integer"}]}])
def test_an_impossible_schema(served: Running, schema: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        served.client().chat.completions.create(model="base", messages=MESSAGES, response_format=form)


def test_half_a_character_in_a_complaint(served: Running) -> None:
    half = {"$ref": "#/$defs/\udc00", "$defs": {"\udc00": {"$ref": "#/$defs/\udc00"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": half}}
    status, _, answer = served.ask("POST", "/v1/completions", {"model": "base", "prompt": "a", "response_format": form})
    assert (status, "requires itself" in answer["error"]["message"]) == (400, True)


def test_without_max_tokens_a_long_prompt_gets_what_room_there_is(served: Running) -> None:
    told = served.client().completions.create(model="base", prompt="x" * 505, extra_body={"ignore_eos": True})
    assert told.usage is not None and told.usage.completion_tokens == 7


def test_what_is_measured(served: Running) -> None:
    before = served.ask("GET", "/stats")[2]
    served.client().completions.create(**GREEDY, prompt="a prompt of more than a page of tokens")
    after = served.ask("GET", "/stats")[2]
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == 12
    assert [layer["layer"] for layer in after["experts"]] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    computed = (
        after["tokens"]["prompt"] - after["tokens"]["cached"] - before["tokens"]["prompt"] + before["tokens"]["cached"]
    )
    for now, then in zip(after["experts"], before["experts"], strict=True):
        # Two experts a token; the last token is never computed.
        assert sum(now["load"]) - sum(then["load"]) == 2 * (computed + 11)
    metrics = dict(line.rsplit(" ", 1) for line in served.ask("GET", "/metrics")[2].splitlines() if line[0] != "#")
    assert float(metrics["moesaic_generated_tokens_total"]) == after["tokens"]["generated"]
    assert float(metrics["moesaic_kv_pages"]) == after["pages"]["total"] > 0
    assert float(metrics["moesaic_time_to_first_token_seconds_count"]) >= 1
    assert float(metrics["moesaic_time_between_tokens_seconds_count"]) >= 11
    assert float(metrics['moesaic_http_responses_total{route="/v1/completions",status="200"}']) >= 1
    assert 'moesaic_expert_rows_total{expert="7",layer="model.layers.1.mlp.experts"}' in metrics


def test_a_dense_model(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with serving(lambda: load(tmp_path, SETTINGS)) as server:
        assert server.client().completions.create(model="base", prompt="x", max_tokens=2).usage
        stats = server.ask("GET", "/stats")[2]
        assert (stats["experts"], stats["chat"]) == ([], False)
        with pytest.raises(openai.BadRequestError, match="chat template"):
            server.client().chat.completions.create(model="base", messages=MESSAGES)


def test_the_page_and_the_document(served: Running) -> None:
    status, headers, text = served.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and "<html" in text
    assert "default-src 'none'" in headers["content-security-policy"]
    document = served.ask("GET", "/openapi.json")[2]
    assert "/v1/chat/completions" in document["paths"] and "/" not in document["paths"]
    assert not any(
        "422" in operation["responses"] for path in document["paths"].values() for operation in path.values()
    )
