"""Batches: bad lines are told before anything runs, order shares most, results are those of each request alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.tiny import VOCABULARY, byte_tokenizer, tiny

from moesaic.errors import DataError, Interrupted, UsageError
from moesaic.serve import offline
from moesaic.serve.batch_file import finished, read_lines
from moesaic.serve.batch_order import batch_order
from moesaic.serve.offline import Batch, Totals, run_batch
from moesaic.serve.request import EngineSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny("olmoe").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def batch(model: Path, file: Path, out: Path, **options: Any) -> Batch:
    return Batch(file, out, model, "tiny", {}, EngineSettings(kv_bytes=1 << 20, max_batch=4), **options)


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({result["custom_id"] for result in found}) == len(found)
    return {result["custom_id"]: result for result in found}


def openai_line(custom_id: str, **body: Any) -> dict[str, Any]:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", **body}}


# The order.


def prefill(prompts: Sequence[Sequence[int]], order: Sequence[int], page: int) -> int:
    """Tokens to be computed with a cache that only holds the prompt before: what an order shares at least."""
    total, before = 0, list[int]()
    for place in order:
        now = list(prompts[place])
        common = next(
            (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now))
        )
        total += len(now) - common // page * page
        before = now
    return total


def tree_size(prompts: Sequence[Sequence[int]], page: int) -> int:
    """Tokens to be computed where every shared page is computed once."""
    pages = {tuple(prompt[:end]) for prompt in prompts for end in range(page, len(prompt) + 1, page)}
    return page * len(pages) + sum(len(prompt) % page for prompt in prompts)


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=12),
    page=st.integers(1, 3),
    data=st.data(),
)
def test_the_order_computes_every_shared_page_once(prompts: list[list[int]], page: int, data: st.DataObject) -> None:
    new = data.draw(st.lists(st.integers(0, 50), min_size=len(prompts), max_size=len(prompts)))
    order = batch_order(prompts, new, page_size=page)
    assert sorted(order) == list(range(len(prompts)))
    # Identical prompts share their full pages only.
    assert prefill(prompts, order, page) == tree_size(prompts, page)


def test_the_branch_with_most_new_tokens_per_token_of_prompt_goes_first() -> None:
    shared_a, shared_b = [1] * 32, [2] * 32
    prompts = [[*shared_a, 5], [*shared_b, 5], [3] * 40, [*shared_b, 6], [*shared_a, 6], [4] * 40]
    new = [10, 30, 4, 40, 10, 400]
    # 400/40; (30 + 40)/34, of which 40/1 before 30/1; (10 + 10)/34, in the file's order; 4/40
    assert batch_order(prompts, new) == [5, 3, 1, 0, 4, 2]


def test_adapters_share_nothing() -> None:
    prompts = [[1] * 40] * 4
    order = batch_order(prompts, [1, 1, 1, 1], ["a", "b", "a", "b"])
    assert order == [0, 2, 1, 3]


def test_prompts_that_each_begin_the_next_need_no_deep_recursion() -> None:
    size = 1500
    prompts = [range(length) for length in range(size)]
    assert batch_order(prompts, [1] * size, page_size=1)[:3] == [0, 1, 2]


# The file.

GOOD = openai_line("a", prompt="x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is no JSON: Expecting property name"),
        ("[1]", "it must be a JSON object"),
        ("\udcff", "it is no UTF-8"),
        ({**GOOD, "extra": 1}, "there is no field 'extra'; allowed: body, custom_id, method, url"),
        ({"custom_id": "b", "body": {}}, "method is missing"),
        ({**GOOD, "custom_id": "b", "method": "GET"}, "method must be 'POST'"),
        (
            {**GOOD, "custom_id": "b", "url": "/v1/embeddings"},
            "url must be one of /v1/completions, /v1/chat",
        ),
        ({**GOOD, "custom_id": 3}, "custom_id must be a string that is not empty"),
        ({**GOOD, "custom_id": "\ud800"}, "custom_id: half of a surrogate pair is no text"),
        ({**GOOD, "custom_id": "b", "body": 3}, "body must be a JSON object"),
        (GOOD, "custom_id 'a' is that of line 1 already"),
        (openai_line("b", prompt="x", temperature=9), "temperature: input should be less than or equal to 2"),
        (openai_line("b", prompt="x", stream=True), "stream: a batch has no streams"),
        (openai_line("b", prompt="x", model="gpt"), "there is no model 'gpt'; given: tiny, poet"),
        ({"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}, "model is missing"),
        ({"prompt": "x", "temprature": 1}, "there is no field 'temprature': did you mean 'temperature'?"),
        ({"text": "x"}, "there is no field 'text'"),
        ({}, "prompt is missing"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_line_is_told_by_its_number(line: Any, message: str, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "in.jsonl"
    path.write_bytes(f"{json.dumps(GOOD)}\n\n{text}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError) as raised:
        read_lines(path, "tiny", ["poet"])
    assert str(raised.value).startswith(f"{str(path)!r} has 1 bad line, so nothing was run: line 3: {message}")


def test_many_bad_lines_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", *["x"] * 12, {"prompt": "good"})
    with pytest.raises(DataError, match=r"12 bad lines, .*line 1: .*; line 10: .*; and 2 more$"):
        read_lines(path, "tiny")
    with pytest.raises(DataError, match="there is no request in"):
        read_lines(write(path, "", ""), "tiny")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_lines(tmp_path / "none", "tiny")


def test_lines_say_what_is_asked_of_whom(tmp_path: Path) -> None:
    chat = openai_line("c", messages=[{"role": "user", "content": "hi"}], model="poet", seed=5)
    path = write(tmp_path / "in.jsonl", {"prompt": "a"}, "", {"prompt": "b", "custom_id": "b"}, chat)
    lines = read_lines(path, "tiny", ["poet"], seed=1)
    assert [(line.number, line.custom_id, line.adapter) for line in lines] == [
        (1, "line-1", None),
        (3, "b", None),
        (4, "c", "poet"),
    ]
    assert lines[2].body.seed == 5
    again, other = read_lines(path, "tiny", ["poet"], seed=1), read_lines(path, "tiny", ["poet"], seed=2)
    assert lines == again
    seeds = {line.body.seed for line in [*lines[:2], *other[:2]]}
    assert len(seeds) == 4 and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


# Running.


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    beginning = "what all of these have in common is a long beginning, "
    return write(
        tmp_path / "in.jsonl",
        *({"prompt": f"{beginning}{name}", "max_tokens": 6} for name in "abcd"),
        {"prompt": ["two", "prompts"], "max_tokens": 5, "n": 2, "logprobs": 2, "temperature": 0},
        openai_line("regex", prompt="say", regex="[a-z]{3}", max_tokens=9),
        {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "stop": ["zzzz"]},
    )


def test_results_are_there_for_every_line(model: Path, requests: Path, tmp_path: Path) -> None:
    seen: list[Totals] = []
    out = tmp_path / "out.jsonl"
    totals = run_batch(batch(model, requests, out), seen.append)
    found = results(out)
    assert sorted(found) == sorted(["line-1", "line-2", "line-3", "line-4", "line-5", "regex", "line-7"])
    for result in found.values():
        assert result["response"]["status_code"] == 200 and result["error"] is None
        assert result["response"]["body"]["object"] == "text_completion"
        assert result["response"]["body"]["model"] == "tiny"
    two = found["line-5"]["response"]["body"]
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    assert two["choices"][0]["text"] == two["choices"][1]["text"]  # greedy, so the same twice
    assert len(two["choices"][2]["logprobs"]["tokens"]) == 5
    assert two["usage"]["prompt_tokens"] == len("two") + len("prompts")
    regex = found["regex"]["response"]["body"]["choices"][0]
    assert len(regex["text"]) == 3 and regex["text"].isascii() and regex["finish_reason"] == "stop"
    assert (totals.requests, totals.found, totals.done) == (7, 0, 7)
    assert totals.cached_tokens >= 3 * 48  # the long beginning's three pages


def texts(out: Path) -> dict[str, Any]:
    return {name: result["response"]["body"]["choices"] for name, result in results(out).items()}


def test_a_batch_that_was_stopped_goes_on_where_it_was(model: Path, requests: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run_batch(batch(model, requests, whole))

    def stop(totals: Totals) -> None:
        if totals.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped with [2-6] of 7 results in .*: the same command goes on"):
        run_batch(batch(model, requests, out), stop)
    before = out.read_text()
    assert 2 <= len(before.splitlines()) < 7
    out.write_text(before + '{"id": "batch_req_torn", "cust')  # as a process that was killed leaves it
    totals = run_batch(batch(model, requests, out))
    assert totals.found == len(before.splitlines()) and totals.done == 7 - totals.found
    assert out.read_text().startswith(before)
    assert texts(out) == texts(whole)
    at_the_end = out.read_text()
    assert run_batch(batch(model, requests, out)) == Totals(7, 7)
    assert out.read_text() == at_the_end


def test_results_do_not_depend_on_what_else_is_in_the_file(model: Path, requests: Path, tmp_path: Path) -> None:
    run_batch(batch(model, requests, tmp_path / "all.jsonl"))
    alone = write(tmp_path / "alone.jsonl", "", *[requests.read_text().splitlines()[1]])
    run_batch(batch(model, alone, tmp_path / "one.jsonl"))
    assert texts(tmp_path / "one.jsonl")["line-2"] == texts(tmp_path / "all.jsonl")["line-2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "x" * 600},
            "line 2: the prompt has 600 tokens and one new token at least is wanted: together they may have at most",
        ),
        ({"prompt": [VOCABULARY]}, "line 2: the prompt has a token that is not among the model's 0 to 287"),
        ({"prompt": [1 << 70]}, "line 2: the prompt has a token that is not among the model's 0 to 287"),
        ({"prompt": "x", "regex": "("}, "line 2: the regular expression cannot be used: unclosed group"),
        ({"prompt": "x", "regex": "a", "min_tokens": 2}, "line 2: min_tokens does not go with regex"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: a chat needs a tokenizer with a chat template"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_model_cannot_do_is_told_before_anything_runs(
    line: dict[str, Any], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Any) -> Any:
        raise AssertionError("a step was made")

    monkeypatch.setattr(offline.Engine, "step", never)
    file = write(tmp_path / "in.jsonl", {"prompt": "good"}, line)
    with pytest.raises(DataError) as raised:
        run_batch(batch(model, file, tmp_path / "out.jsonl"))
    assert message in str(raised.value)
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_results_of_other_requests_are_not_taken_for_these(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    lines = read_lines(write(tmp_path / "in.jsonl", {"prompt": "x"}), "tiny")
    out.write_text(json.dumps({"id": lines[0].result_id, "custom_id": "line-1"}) + "\n")
    assert finished(out, lines) == {"line-1"}
    other_seed = read_lines(tmp_path / "in.jsonl", "tiny", seed=1)
    other_prompt = read_lines(write(tmp_path / "other.jsonl", {"prompt": "y"}), "tiny")
    for changed in (other_seed, other_prompt):
        with pytest.raises(DataError, match="has a result for 'line-1' of another request"):
            finished(out, changed)
    with pytest.raises(DataError, match=r"line 1 of .* is no result of a batch: give another --out"):
        finished(write(out, {"prompt": "x"}), lines)
    with pytest.raises(UsageError, match="--out is the file of requests itself"):
        run_batch(batch(model, tmp_path / "in.jsonl", tmp_path / "in.jsonl"))


def test_prompts_are_ordered_for_the_engine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    add = offline.Engine.add

    def recording(self: Any, request: Any) -> None:
        added.append(int(np.asarray(request.prompt_ids)[-1]))
        add(self, request)

    monkeypatch.setattr(offline.Engine, "add", recording)
    asked = [(10, 1, 1), (11, 2, 3), (12, 1, 1), (13, 2, 3)]
    lines = [{"prompt": [*[group] * 32, last], "max_tokens": length} for last, group, length in asked]
    file = write(tmp_path / "in.jsonl", *lines)
    run_batch(batch(model, file, tmp_path / "out.jsonl"))
    assert added == [11, 13, 10, 12]
