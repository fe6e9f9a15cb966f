"""Capacity: who is served, who is dropped, and that it is counted."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from torch import nn

from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.hf import causality
from moesaic.routing import Routing, expert_capacity, limit_capacity
from moesaic.routing.capacity import ffn_factor


def routing_of(ids: list[list[int]], num_experts: int) -> Routing:
    expert_ids = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), -1)
    weights = torch.rand(expert_ids.shape).masked_fill(expert_ids >= num_experts, 0.0)
    return Routing(expert_ids, weights, torch.rand(len(ids), num_experts))


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "capacity"),
    [
        (8, 2, 4, 1.0, 4),
        (8, 2, 4, 1.25, 5),
        (7, 2, 4, 1.0, 4),
        (8, 2, 4, -0.5, 2),
        (0, 2, 4, 1.0, 0),
        (1, 1, 64, 1.0, 1),
    ],
)
def test_expert_capacity(tokens: int, top_k: int, experts: int, factor: float, capacity: int) -> None:
    assert expert_capacity(tokens, top_k, experts, factor) == capacity


def test_first_choices_go_before_second_ones() -> None:
    # Expert 0 has room for two: the later token's first choice is served before the earlier token's second one.
    routing = limit_capacity(routing_of([[1, 0], [0, 1], [0, 2], [2, 0]], 3), factor=0.75)
    assert routing.expert_ids.tolist() == [[1, 3], [0, 1], [0, 2], [2, 3]]
    assert int(routing.dropped) == 2


def test_earlier_tokens_go_before_later_ones() -> None:
    routing = limit_capacity(routing_of([[0]] * 6, 3), factor=1.0)
    assert routing.expert_ids[:, 0].tolist() == [0, 0, 3, 3, 3, 3]
    assert int(routing.dropped) == 4


def test_the_weights_that_remain_do_not_change() -> None:
    before = routing_of([[0, 1], [0, 2], [0, 1]], 3)
    after = limit_capacity(before, factor=0.5)
    kept = after.expert_ids < 3
    assert torch.equal(after.weights[kept], before.weights[kept])
    assert (after.weights[~kept] == 0).all()


def test_dropless_counts_nothing() -> None:
    routing = routing_of([[0], [0]], 2)
    assert limit_capacity(routing, 0.0) is routing


def test_null_slots_take_no_room_and_are_not_counted_as_dropped() -> None:
    routing = limit_capacity(routing_of([[2, 2], [2, 2], [0, 1], [0, 1]], 2), factor=0.5)  # room for two
    assert routing.expert_ids.tolist() == [[2, 2], [2, 2], [0, 1], [0, 1]]
    assert int(routing.dropped) == 0


@st.composite
def slots(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Expert ids for at most 12 tokens, null slots among them, and the number of experts."""
    experts, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, experts), min_size=top_k, max_size=top_k)
    return draw(st.lists(row, min_size=1, max_size=12)), experts


@given(case=slots(), factor=st.floats(0.01, 4.0) | st.floats(-4.0, -0.01))
def test_agrees_with_serving_one_slot_after_the_other(case: tuple[list[list[int]], int], factor: float) -> None:
    rows, experts = case
    routing = routing_of(rows, experts)
    limited = limit_capacity(routing, factor)

    plain = [[reference.NULL if e == experts else e for e in row] for row in rows]
    settings = reference.Settings(experts, routing.top_k, capacity_factor=factor)
    kept, dropped = reference.limit(plain, settings)
    assert limited.expert_ids.tolist() == [[experts if e == reference.NULL else e for e in row] for row in kept]
    assert int(limited.dropped) == dropped
    capacity = math.ceil(abs(factor) * len(rows) * routing.top_k / experts)
    assert limited.counts().tolist() == [min(n, capacity) for n in routing.counts().tolist()]


class TestHeterogeneous:
    """MoE++, its heterogeneous expert capacity: γ·τ·T / (τ·N_FFN + N_ZC) rows for a feed-forward expert, γ·T / (...)
    for another."""

    @pytest.mark.parametrize("factor", [1.0, 0.7, -1.1])
    @pytest.mark.parametrize("tau", [0.1, 0.5, 0.75, 1.0, 2.0])
    def test_is_the_papers(self, tau: float, factor: float) -> None:
        tokens, top_k, num_ffn, others = 29, 3, 4, 3
        torch.manual_seed(0)
        ids = torch.rand(tokens, num_ffn + others).topk(top_k).indices
        routing = routing_of(ids.tolist(), num_ffn + others)
        routing.num_ffn = num_ffn
        limited = limit_capacity(routing, factor, tau)

        share = abs(factor) * tokens * top_k / (tau * num_ffn + others)
        room = [math.ceil(share * (tau if e < num_ffn else 1)) for e in range(num_ffn + others)]
        wanted, dropped = ids.tolist(), 0
        for k in range(top_k):
            for row in wanted:
                room[row[k]] -= 1
                if room[row[k]] < 0:
                    row[k], dropped = num_ffn + others, dropped + 1
        assert limited.expert_ids.tolist() == wanted
        assert limited.dropped is not None and int(limited.dropped) == dropped
        capacity = expert_capacity(tokens, top_k, num_ffn, ffn_factor(factor, num_ffn, others, tau))
        assert int(limited.counts()[:num_ffn].max()) <= capacity == math.ceil(share * tau)

    def test_a_small_tau_leaves_room_for_those_that_cost_nothing(self) -> None:
        routing = routing_of([[e] for e in [0, 1, 2, 3] * 6], 4)
        routing.num_ffn = 2
        assert limit_capacity(routing, 1.0, 0.5).counts().tolist() == [4, 4, 6, 6]

    def test_without_others_tau_changes_nothing(self) -> None:
        assert ffn_factor(0.1, 3, 0, 0.5) == 0.1
        routing = routing_of([[0], [0], [1], [0]], 2)
        assert limit_capacity(routing, 1.0, 0.5).expert_ids.tolist() == limit_capacity(routing, 1.0).expert_ids.tolist()


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_factor_that_is_no_number(factor: float) -> None:
    with pytest.raises(ConfigError, match=f"capacity_factor is {factor}: it must be finite"):
        limit_capacity(routing_of([[0]], 1), factor)


def test_later_tokens_push_out_second_choices_of_earlier_ones() -> None:
    """With one factor throughout: the longer text gives each expert more room, and token 0 less."""
    rows, factor = [[0, 1], [2, 3], [1, 0], [1, 0]], -1.0
    assert [expert_capacity(tokens, 2, 4, factor) for tokens in (1, 2, 4)] == [1, 1, 2]
    assert limit_capacity(routing_of(rows[:1], 4), factor).expert_ids.tolist() == [[0, 1]]
    assert limit_capacity(routing_of(rows[:2], 4), factor).expert_ids.tolist() == [[0, 1], [2, 3]]
    assert limit_capacity(routing_of(rows, 4), factor).expert_ids[:2].tolist() == [[0, 4], [2, 3]]


def test_text_is_written_with_a_warning_once_a_model() -> None:
    free, limited, other = (MoE(MoEConfig(4, 4, 2, capacity_factor=factor)) for factor in (0.0, -1.0, -1.0))
    assert causality.later_slots_seen([free]) == ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in (free, limited, limited, nn.Sequential(limited), other):
            causality.refuse_generation(model)
    assert [each.category for each in caught] == [causality.NotCausalWarning] * 2
    assert all("capacity_factor -1.0 is not causal" in str(each.message) for each in caught)
