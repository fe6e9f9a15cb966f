"""Tokens are drawn from the distribution that transformers' processors give, and from a row's own data alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moesaic.errors import ConfigError
from moesaic.serve.request import SamplingParams
from moesaic.serve.sampling import Sampled, Sampler, SamplingState, make_state, validate
from moesaic.serve.vocabulary import Vocabulary

PROMPT = [3, 5, 5, 8]
OUTPUT = [5, 11, 11, 2]
ENDS = (7, 9)


def state(params: SamplingParams, seed: int = 0, output: Sequence[int] = OUTPUT) -> SamplingState:
    tokenizer: Any = SimpleNamespace()
    made = make_state(params, PROMPT, Vocabulary(tokenizer, 1000, ENDS), 0)
    made.output_ids.extend(output)
    made.seed = seed
    return made


def logits(size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits_V: Tensor, params: SamplingParams) -> np.ndarray[Any, Any]:
    """Probabilities [V] in float64, as transformers' processors make them from the same settings."""
    ids_1S = torch.tensor([[*PROMPT, *OUTPUT]])
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, list(ENDS)))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    steps.append(TopPLogitsWarper(params.top_p))
    steps.append(MinPLogitsWarper(params.min_p))
    return steps(ids_1S, logits_V[None].clone())[0].double().softmax(0).numpy()


def draws(logits_V: Tensor, params: SamplingParams, count: int) -> np.ndarray[Any, Any]:
    """How often each token comes, over as many seeds."""
    sampled = Sampler().sample(logits_V.expand(count, -1), [state(params, seed) for seed in range(count)])
    return np.bincount([one.token for one in sampled], minlength=len(logits_V))


def assert_drawn_from(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> None:
    """Pearson's chi-square, rare tokens taken together; five standard deviations of its distribution."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    seen = np.append(counts[often], counts[~often].sum())
    told = np.append(expected[often], expected[~often].sum())
    seen, told = seen[told > 0], told[told > 0]
    freedom = len(told) - 1
    assert ((seen - told) ** 2 / told).sum() < freedom + 5 * math.sqrt(2 * freedom) + 1e-9


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 12},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
    {"repetition_penalty": 1.5},
    {"logit_bias": {4: 3.0, 11: -2.0}, "repetition_penalty": 0.7},
    {"min_tokens": 5},
    {"top_p": 1e-9},
    {"top_k": 1000},
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [40, 700])
def test_draws_are_distributed_as_transformers_says(chosen: dict[str, Any], size: int) -> None:
    params, logits_V = SamplingParams(**chosen), logits(size)
    assert_drawn_from(draws(logits_V, params, 3000), reference(logits_V, params))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    temperature=st.floats(0.2, 3.0),
)
def test_filters_leave_what_transformers_leaves(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_V = logits(40, seed)
    expected = reference(logits_V, params)
    counts = draws(logits_V, params, 150)
    assert counts[expected == 0].sum() == 0
    assert counts[expected > 0.2].all()


def test_the_draws_of_one_seed_are_distributed_so_over_positions() -> None:
    logits_V = logits(40)
    states = [state(SamplingParams(), seed=5, output=[0] * position) for position in range(3000)]
    counts = np.bincount(
        [one.token for one in Sampler().sample(logits_V.expand(3000, -1), states)], minlength=len(logits_V)
    )
    assert_drawn_from(counts, reference(logits_V, SamplingParams()))


def test_penalties_of_presence_and_frequency_count_the_output_alone() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    logits_V = logits(40)
    lowered = logits_V.double()
    for token, times in ((5, 1), (11, 2), (2, 1)):  # 3 and 8 are in the prompt only
        lowered[token] -= 0.5 + 0.25 * times
    assert_drawn_from(draws(logits_V, params, 3000), lowered.softmax(0).numpy())


def test_penalties_follow_the_output_as_it_grows_and_is_taken_back() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    logits_1V = torch.tensor([[0.0, 0.9, 0.5, 0.0]])
    one = state(params, output=[])
    chosen = []
    for _ in range(5):
        chosen.append(Sampler().sample(logits_1V, [one])[0].token)
        one.output_ids.append(chosen[-1])
    assert chosen == [1, 2, 0, 3, 1]
    del one.output_ids[1:]
    assert Sampler().sample(logits_1V, [one])[0].token == 2


def test_greedy_takes_the_first_of_the_most_probable() -> None:
    logits_SV = torch.stack([logits(300, seed) for seed in range(6)])
    logits_SV[2, [40, 50, 60]] = 99.0
    greedy = SamplingParams(temperature=0)
    tokens = [one.token for one in Sampler().sample(logits_SV, [state(greedy) for _ in range(6)])]
    assert tokens == logits_SV.argmax(-1).tolist() and tokens[2] == 40


def test_a_tiny_temperature_is_greedy() -> None:
    logits_SV = torch.stack([logits(300, seed) for seed in range(6)])
    states = [state(SamplingParams(temperature=10.0**-power)) for power in (5, 10, 40, 100, 300, 320)]
    assert [one.token for one in Sampler().sample(logits_SV, states)] == logits_SV.argmax(-1).tolist()


def test_end_tokens_do_not_come_before_the_least_number() -> None:
    logits_1V = torch.zeros(1, 40)
    logits_1V[0, list(ENDS)] = 50.0
    logits_1V[0, 12] = 60.0
    params = SamplingParams(temperature=0, min_tokens=5, stop_token_ids=(12,))
    assert Sampler().sample(logits_1V, [state(params)])[0].token == 0
    assert Sampler().sample(logits_1V, [state(params, output=[1] * 5)])[0].token == 12
    ignoring = SamplingParams(temperature=0, min_tokens=5, stop_token_ids=(12,), ignore_eos=True)
    assert Sampler().sample(logits_1V, [state(ignoring)])[0].token == ENDS[0]


VARIED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(logprobs=0),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, logprobs=5),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(top_p=0.5, presence_penalty=1.0, logit_bias={3: 4.0}, min_tokens=20),
]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_the_others(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([15, 33, 256, 257, 1003, 4099]))
    kinds = data.draw(st.lists(st.integers(0, len(VARIED) - 1), min_size=1, max_size=9))
    logits_SV = torch.stack([logits(size, row) for row in range(len(kinds))])

    def states() -> list[SamplingState]:
        return [state(VARIED[kind], seed=row, output=[row % 7] * row) for row, kind in enumerate(kinds)]

    together = Sampler().sample(logits_SV, states())
    alone = [Sampler().sample(logits_SV[row : row + 1].clone(), [one])[0] for row, one in enumerate(states())]
    assert together == alone  # to the last bit of the log-probabilities
    order = data.draw(st.permutations(range(len(kinds))))
    made = states()
    shuffled = Sampler().sample(logits_SV[order], [made[row] for row in order])
    assert [shuffled[order.index(row)] for row in range(len(kinds))] == together


def test_logits_are_not_changed() -> None:
    logits_SV = torch.stack([logits(300, seed) for seed in range(len(VARIED))])
    before = logits_SV.clone()
    Sampler().sample(logits_SV, [state(params) for params in VARIED])
    assert torch.equal(logits_SV, before)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0}])
def test_logprobs_are_those_of_the_model_itself(options: dict[str, Any]) -> None:
    logits_V = logits(300)
    expected = logits_V.double().log_softmax(0)
    sampled = Sampler().sample(logits_V[None], [state(SamplingParams(**options, logprobs=4))])[0]
    assert sampled.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-6)
    values, ids = expected.topk(4)
    assert [token for token, _ in sampled.top] == ids.tolist()
    assert [value for _, value in sampled.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_of_equally_probable_tokens_the_first_are_told() -> None:
    sampled = Sampler().sample(torch.zeros(1, 50), [state(SamplingParams(temperature=0, logprobs=3))])[0]
    assert sampled == Sampled(0, -math.log(50), [(0, -math.log(50)), (1, -math.log(50)), (2, -math.log(50))])


@pytest.mark.parametrize("params", VARIED, ids=str)
def test_numbers_that_are_none_do_not_stop_the_others(params: SamplingParams) -> None:
    logits_SV = torch.stack([logits(300, seed) for seed in range(4)])
    expected = Sampler().sample(logits_SV[:1], [state(params)])[0]
    logits_SV[1, 17] = math.nan
    logits_SV[2] = math.nan
    logits_SV[3, 21] = math.inf
    sampled = Sampler().sample(logits_SV, [state(params) for _ in range(4)])
    assert sampled[0] == expected
    assert sampled[1].token != 17 and sampled[3].token == 21
    assert all(math.isfinite(one.logprob) and 0 <= one.token < 300 for one in sampled)


def test_continuations_have_seeds_of_their_own() -> None:
    tokenizer: Any = SimpleNamespace()
    vocabulary = Vocabulary(tokenizer, 1000, ENDS)
    logits_1V = torch.zeros(1, 1000)

    def first(seed: int | None, index: int) -> int:
        made = make_state(SamplingParams(seed=seed), PROMPT, vocabulary, index)
        return Sampler().sample(logits_1V, [made])[0].token

    assert first(7, 2) == first(9, 0) == first(7, 2)
    assert len({first(7, index) for index in range(20)}) > 15
    assert len({first(None, 0) for _ in range(20)}) > 10
    assert first(-3, 0) == first(-3, 0) and 0 <= first(2**70, 0) < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0: it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0: it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0: it must be at least 0 (0 is greedy)"),
        ({"temperature": math.inf}, "temperature is inf: it must be at least 0 (0 is greedy)"),
        ({"temperature": math.nan}, "temperature is nan: it must be at least 0 (0 is greedy)"),
        ({"top_k": -1}, "top_k is -1: it must be at least 0 (0 is no limit)"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p is nan: it must be above 0 and at most 1"),
        ({"min_p": 1.1}, "min_p is 1.1: it must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: it must be from 0.01 to 100 (1 is none)"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan: it must be a finite number"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf: it must be a finite number"),
        ({"logit_bias": {1000: 1.0}}, "logit_bias is {1000: 1.0}: it must be token ids from 0 to 999"),
        ({"logit_bias": {1: math.nan}}, "logit_bias is {1: nan}: it must be finite numbers"),
        ({"stop": ("a", "")}, "stop is ('a', ''): it must be strings that are not empty"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is (-1,): it must be token ids from 0 to 999"),
        ({"min_tokens": -1}, "min_tokens is -1: it must be at least 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, above max_tokens, which is 4"),
        ({"logprobs": -1}, "logprobs is -1: it must be at least 0"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar exclude each other: a text matches one of them"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos does not go with regex, which decides where the text may end"),
        ({"regex": "a", "min_tokens": 1}, "min_tokens does not go with regex, which decides where the text may end"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(SamplingParams(**options), 1000)
    assert str(raised.value) == message


def test_good_settings_pass() -> None:
    for params in VARIED:
        validate(params, 1000)
    validate(SamplingParams(stop=("x",), stop_token_ids=(999,), seed=-5, json_schema="{}"), 1000)
