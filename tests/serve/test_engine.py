"""The engine says what transformers' generate says, whatever else is going on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.driving import (
    END,
    GREEDY,
    PROMPTS,
    TOKENIZER,
    assert_all_returned,
    engine_of,
    finish,
    gathered,
    generated,
    run,
)
from tests.serve.tiny import VOCABULARY
from torch import Tensor

from moesaic.errors import ConfigError, UnsupportedError, UsageError
from moesaic.serve.request import Output, Request, SamplingParams


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmoe", {"token_budget": 7, "max_batch": 4}),
        ("olmoe", {"token_budget": 64}),
        ("olmoe", {"token_budget": 512, "prefix_sharing": False}),
        ("olmoe", {"token_budget": 40, "pages": 20}),
        ("olmoe", {"token_budget": 100, "pages": 14, "prefix_sharing": False}),
        ("olmoe", {"isolate": True}),
        ("moesaic", {"token_budget": 50, "pages": 20}),
    ],
    ids=str,
)
def test_greedy_is_generate(family: str, options: dict[str, Any]) -> None:
    engine = engine_of(family, **options)
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, GREEDY))
    outputs = engine.step()
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(f"later {number}", prompt, replace(GREEDY, max_tokens=9)))
    found = gathered(outputs + finish(engine))
    for number, prompt in enumerate(PROMPTS):
        expected = generated(prompt, 24, family)
        assert found[str(number), 0].token_ids == expected
        assert found[f"later {number}", 0].token_ids == expected[:9]
    assert_all_returned(engine)
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("pages" in options)
    assert (stats.cached_tokens > 0) == ("prefix_sharing" not in options)
    assert stats.finished == 2 * len(PROMPTS)
    assert stats.generated_tokens == len(PROMPTS) * (24 + 9)
    assert stats.prompt_tokens == 2 * sum(map(len, PROMPTS))
    if "prefix_sharing" in options:
        assert stats.pages_cached == 0


def test_every_family_is_served() -> None:
    for family in ("llama", "gpt_oss", "deepseek_v3"):
        engine = engine_of(family, pages=2000, token_budget=50)
        found = run(engine, *(Request(str(i), prompt, GREEDY) for i, prompt in enumerate(PROMPTS[2:6])))
        for i, prompt in enumerate(PROMPTS[2:6]):
            assert found[str(i), 0].token_ids == generated(prompt, 24, family), family


def test_a_running_request_gets_a_token_in_every_step() -> None:
    engine = engine_of(token_budget=16)
    engine.add(Request("steady", PROMPTS[1], GREEDY))
    tokens = [output.token_ids for output in engine.step()]
    engine.add(Request("long", PROMPTS[7], GREEDY))
    for _ in range(5):
        (output,) = engine.step()
        assert output.request_id == "steady"
        tokens.append(output.token_ids)
    assert all(len(each) == 1 for each in tokens)


def test_continuations_have_a_seed_each() -> None:
    engine = engine_of(token_budget=30)
    params = SamplingParams(max_tokens=8, seed=5, n=3, ignore_eos=True)
    found = run(engine, Request("three", PROMPTS[5], params))
    alone = {
        index: run(engine, Request("one", PROMPTS[5], replace(params, seed=5 + index, n=1)))["one", 0].token_ids
        for index in range(3)
    }
    assert {index: output.token_ids for (_, index), output in found.items()} == alone
    assert len(set(alone.values())) == 3
    assert all(output.prompt_tokens == 60 for output in found.values())
    assert_all_returned(engine)


def test_a_prompt_that_is_known_is_not_computed_again() -> None:
    engine = engine_of()
    first = run(engine, Request("a", PROMPTS[7], GREEDY))["a", 0]
    again = run(engine, Request("a", PROMPTS[7], GREEDY))["a", 0]
    assert (first.cached_tokens, again.cached_tokens) == (0, 144)  # 160 without the last page
    conversation = PROMPTS[7] + first.token_ids + (1, 2, 3)
    longer = run(engine, Request("b", conversation, GREEDY))["b", 0]
    assert longer.cached_tokens == 176  # what was generated is known, too
    assert longer.token_ids == generated(conversation, 24)


def token_of(prompt: tuple[int, ...], place: int) -> int:
    """A token that generate says at this place, and not before."""
    tokens = generated(prompt, 24)
    assert tokens[place] not in tokens[:place]
    return tokens[place]


def test_where_it_ends() -> None:
    prompt = PROMPTS[2]
    expected = generated(prompt, 24)
    engine = engine_of()
    token = token_of(prompt, 3)
    asked = {
        "length": GREEDY,
        "id": replace(GREEDY, stop_token_ids=(token,)),
        "not before": replace(GREEDY, stop_token_ids=(token,), min_tokens=4),
        "end": replace(GREEDY, ignore_eos=False, logit_bias={END: 1e4}),
        "ignored": replace(GREEDY, logit_bias={END: 1e4}, max_tokens=3),
    }
    found = run(engine, *(Request(name, prompt, params) for name, params in asked.items()))
    outcome = {name: (output.token_ids, output.finish_reason) for (name, _), output in found.items()}
    assert outcome["length"] == (expected, "length")
    assert outcome["id"] == (expected[:4], "stop")
    assert outcome["not before"][0][:3] == expected[:3] and token not in outcome["not before"][0][:3]
    assert outcome["end"] == ((END,), "stop")
    assert outcome["ignored"] == ((END,) * 3, "length")
    assert found["end", 0].text == ""
    assert_all_returned(engine)


def test_a_stop_string_ends_the_text_before_it() -> None:
    letters = replace(GREEDY, logit_bias=dict.fromkeys(range(33, 91), 50.0))
    engine = engine_of()
    whole = run(engine, Request("whole", PROMPTS[3], letters))["whole", 0]
    assert whole.text == TOKENIZER.decode(whole.token_ids)
    stop = whole.text[6:8]
    place = whole.text.index(stop)
    stopped = run(engine, Request("cut", PROMPTS[3], replace(letters, stop=(stop,))))["cut", 0]
    assert stopped.text == whole.text[:place]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: place + 2]


def test_log_probabilities_come_with_their_tokens() -> None:
    engine = engine_of()
    found = run(engine, Request("a", PROMPTS[2], replace(GREEDY, logprobs=2, max_tokens=5)))["a", 0]
    assert [entry.token for entry in found.logprobs] == list(found.token_ids)
    assert all(len(entry.top) == 2 and entry.top[0] == (entry.token, entry.logprob) for entry in found.logprobs)


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    engine = engine_of(token_budget=40, max_batch=2)
    for name in ("running", "prefilling", "waiting"):
        engine.add(Request(name, PROMPTS[6], replace(GREEDY, n=2)))
    engine.step()
    for name in ("waiting", "running", "prefilling", "unknown"):
        engine.cancel(name)
    assert engine.has_work
    outputs = engine.step()
    assert sorted((output.request_id, output.index) for output in outputs) == sorted(
        (name, index) for name in ("running", "prefilling", "waiting") for index in range(2)
    )
    assert {output.finish_reason for output in outputs} == {"cancelled"}
    assert_all_returned(engine)
    assert engine.stats().finished == 0
    assert run(engine, Request("running", PROMPTS[6], GREEDY))["running", 0].token_ids == generated(PROMPTS[6], 24)


def test_a_step_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(token_budget=60)
    for number in range(4):
        engine.add(Request(str(number), PROMPTS[number + 3], GREEDY))
    outputs = engine.step() + engine.step()

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", fail)
        with pytest.raises(MemoryError):
            engine.step()
    assert sorted(engine.computing) == ["0", "1", "2", "3"]
    assert engine.stats().pages_used == engine.stats().pages_cached == 0
    found = gathered(outputs + finish(engine))
    for number in range(4):
        assert found[str(number), 0].token_ids == generated(PROMPTS[number + 3], 24)


def test_expert_load_counts_every_token_once() -> None:
    engine = engine_of(prefix_sharing=False)
    run(engine, Request("a", PROMPTS[4], GREEDY), Request("b", PROMPTS[5], GREEDY))
    load = engine.stats().expert_load
    assert list(load) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    computed = len(PROMPTS[4]) + len(PROMPTS[5]) + 2 * (24 - 1)
    assert all(len(counts) == 8 and sum(counts) == 2 * computed for counts in load.values())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", ()), "no tokens"),
        (Request("a", [0] * 512), "the prompt has 512 tokens and one new token at least is wanted.*512, the context"),
        (Request("a", [0] * 500, SamplingParams(max_tokens=13)), "500 tokens and max_tokens is 13"),
        (Request("a", [VOCABULARY]), "a token that is not among the model's 0 to 287"),
        (Request("a", [-1]), "a token that is not among the model's 0 to 287"),
        (Request("a", [0], SamplingParams(temperature=-1)), "temperature"),
        (Request("a", [0], SamplingParams(n=0)), "n is 0"),
        (Request("there", [0]), "a request 'there' already"),
        (Request("a", [0], adapter="poet"), "no adapter 'poet': allowed: none"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(request_: Request, message: str) -> None:
    engine = engine_of()
    engine.add(Request("there", [0], GREEDY))
    with pytest.raises(UsageError, match=message):
        engine.add(request_)
    assert run(engine)["there", 0].token_ids == generated((0,), 24)


def test_a_cache_too_small_for_a_request_is_said() -> None:
    engine = engine_of(pages=3)
    assert engine.max_context == 49
    with pytest.raises(UsageError, match="at most 49, the KV cache's pages"):
        engine.add(Request("a", [0] * 40, SamplingParams(max_tokens=10)))
    found = run(engine, Request("a", (0,) * 40, replace(GREEDY, max_tokens=None)))
    assert found["a", 0].token_ids == generated((0,) * 40, 24)[:9]
    with pytest.raises(ConfigError, match="room for 49 tokens, too few for one request of max_context = 64"):
        engine_of(pages=3, max_context=64)
    with pytest.raises(ConfigError, match="page_size is 0"):
        engine_of(page_size=0)
    with pytest.raises(UnsupportedError, match="pages of 16 tokens"):
        engine_of(page_size=8, isolate=True)


def test_pages_of_another_size_do_as_well() -> None:
    found = run(engine_of(page_size=5, kv_bytes=1 << 20), *(Request(str(i), PROMPTS[i], GREEDY) for i in range(6)))
    for i in range(6):
        assert found[str(i), 0].token_ids == generated(PROMPTS[i], 24)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 24), st.integers(1, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 9), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=12)
@given(actions, st.integers(16, 40), st.integers(3, 80), st.booleans())
def test_whatever_happens(actions: list[tuple[str, int, int, int]], pages: int, budget: int, sharing: bool) -> None:
    engine = engine_of(pages=pages, token_budget=budget, max_batch=5, prefix_sharing=sharing)
    wanted: dict[str, tuple[int, ...]] = {}
    outputs: list[Output] = []
    for number, (action, which, length, n) in enumerate(actions):
        if action == "add":
            prompt = PROMPTS[which]
            wanted[str(number)] = generated(prompt, 24)[:length]
            engine.add(Request(str(number), prompt, replace(GREEDY, max_tokens=length, n=n)))
        elif action == "cancel":
            engine.cancel(str(which))
        else:
            outputs += [output for _ in range(which) for output in engine.step()]
    for (name, _), output in gathered(outputs + finish(engine)).items():
        expected = wanted[name]
        assert output.finish_reason in ("length", "cancelled")
        assert output.token_ids == expected[: len(output.token_ids)]
        assert output.finish_reason == "cancelled" or output.token_ids == expected
    assert_all_returned(engine)
    engine._scheduler.tree.clear()
    assert engine._scheduler.pool.free == pages
