"""Dispatch: invariants for any routing, gradients, null slots, and the shapes that do not depend on the data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic import Dispatch, Routing
from moesaic.routing import limit_capacity

NAN = float("nan")


def routing_of(ids: list[list[int]], num_experts: int, dtype: torch.dtype = torch.float64) -> Routing:
    expert_ids = torch.tensor(ids, dtype=torch.int64)
    weights = torch.rand(expert_ids.shape, dtype=dtype).masked_fill(expert_ids >= num_experts, 0.0)
    return Routing(expert_ids, weights, torch.rand(len(ids), num_experts))


def empty(top_k: int = 2, num_experts: int = 3) -> Routing:
    ids = torch.empty(0, top_k, dtype=torch.int64)
    return Routing(ids, torch.empty(0, top_k), torch.empty(0, num_experts))


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Any routing, null slots and experts that a token takes twice included."""
    experts, top_k = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    row = st.lists(st.integers(0, experts), min_size=top_k, max_size=top_k)
    return routing_of(draw(st.lists(row, min_size=1, max_size=14)), experts)


factors = st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0, 5.0, -0.4, -1.0])


def weighted(routing: Routing, x: Tensor) -> Tensor:
    """What identity experts say: each token times the weights of its slots that are not null."""
    real = routing.expert_ids < routing.num_experts
    return x * (routing.weights * real).sum(dim=1, keepdim=True).to(x.dtype)


@given(routing=routings(), factor=factors)
def test_every_slot_that_is_not_null_has_exactly_one_row(routing: Routing, factor: float) -> None:
    routing = limit_capacity(routing, factor)
    dispatch = Dispatch.from_routing(routing, factor)
    slots = routing.expert_ids.numel()
    real = {slot for slot, e in enumerate(routing.expert_ids.flatten().tolist()) if e < routing.num_experts}

    rows = dispatch.permutation.tolist()
    assert sorted(slot for slot in rows if slot < slots) == sorted(real)
    assert all(slot == slots for slot in rows if slot not in real)
    for slot, row in enumerate(dispatch.inverse.flatten().tolist()):
        assert rows[row] == slot if slot in real else row == len(rows)


@given(routing=routings(), factor=factors)
def test_counts_and_offsets(routing: Routing, factor: float) -> None:
    routing = limit_capacity(routing, factor)
    dispatch = Dispatch.from_routing(routing, factor)
    assert dispatch.offsets.tolist() == dispatch.counts.cumsum(0).tolist()
    assert dispatch.offsets.dtype == torch.int32
    assert (dispatch.num_tokens, dispatch.top_k) == tuple(routing.expert_ids.shape)
    assert dispatch.num_experts == routing.num_experts
    if factor > 0:
        slots = routing.expert_ids.numel()
        capacity = min(slots, math.ceil(factor * slots / routing.num_experts))
        assert dispatch.counts.tolist() == [capacity] * routing.num_experts
        assert dispatch.permutation.numel() == routing.num_experts * capacity
    else:
        assert dispatch.counts.tolist() == routing.counts().tolist()
        assert int(dispatch.counts.sum()) == int((routing.expert_ids < routing.num_experts).sum())


@given(routing=routings(), factor=factors)
def test_rows_are_grouped_by_expert_in_the_order_of_the_tokens(routing: Routing, factor: float) -> None:
    routing = limit_capacity(routing, factor)
    dispatch = Dispatch.from_routing(routing, factor)
    ids = [*routing.expert_ids.flatten().tolist(), None]  # None: padding
    of_row = dispatch.expert_of_row().tolist()
    start = 0
    for expert, end in enumerate(dispatch.offsets.tolist()):
        slots = [slot for slot in dispatch.permutation[start:end].tolist() if ids[slot] is not None]
        assert of_row[start:end] == [expert] * (end - start)
        assert [ids[slot] for slot in slots] == [expert] * len(slots)
        assert slots == sorted(slots)
        start = end
    assert of_row[start:] == [routing.num_experts] * (len(of_row) - start)


@given(routing=routings(), factor=factors)
def test_identity_experts_give_the_weighted_input(routing: Routing, factor: float) -> None:
    routing = limit_capacity(routing, factor)
    dispatch = Dispatch.from_routing(routing, factor)
    x = torch.randn(dispatch.num_tokens, 3, dtype=torch.float64)
    rows = dispatch.gather(x)
    for row, slot in enumerate(dispatch.permutation.tolist()):
        wanted = x[slot // dispatch.top_k] if slot < routing.expert_ids.numel() else torch.zeros(3, dtype=x.dtype)
        assert torch.equal(rows[row], wanted)
    torch.testing.assert_close(dispatch.combine(rows), weighted(routing, x))


@given(routing=routings(), factor=st.sampled_from([0.0, 20.0]), seed=st.integers(0, 99))
def test_permuted_tokens_give_permuted_outputs(routing: Routing, factor: float, seed: int) -> None:
    """Where nothing is dropped: capacity goes by the order of the tokens."""
    order = torch.randperm(routing.expert_ids.shape[0], generator=torch.Generator().manual_seed(seed))
    moved = Routing(routing.expert_ids[order], routing.weights[order], routing.scores[order])
    x = torch.randn(len(order), 3, dtype=torch.float64)
    factors_E = torch.randn(routing.num_experts + 1, 1, dtype=torch.float64)  # experts that scale, each by its own

    def run(routing: Routing, x: Tensor) -> Tensor:
        dispatch = Dispatch.from_routing(routing, factor)
        return dispatch.combine(dispatch.gather(x) * factors_E[dispatch.expert_of_row()])

    torch.testing.assert_close(run(moved, x[order]), run(routing, x)[order])


@given(routing=routings(), factor=factors)
def test_rows_that_nobody_reads_may_hold_anything(routing: Routing, factor: float) -> None:
    routing = limit_capacity(routing, factor)
    dispatch = Dispatch.from_routing(routing, factor)
    x = torch.randn(dispatch.num_tokens, 3, dtype=torch.float64)
    rows = dispatch.gather(x)
    rows[dispatch.permutation == routing.expert_ids.numel()] = NAN
    rows.requires_grad_()
    weights = dispatch.weights = dispatch.weights.clone().requires_grad_()
    out = dispatch.combine(rows)
    torch.testing.assert_close(out, weighted(routing, x))
    out.sum().backward()
    assert rows.grad.isfinite().all()
    assert weights.grad.isfinite().all()
    assert (weights.grad[routing.expert_ids >= routing.num_experts] == 0).all()


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0, -0.5])
@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        ([[0, 2], [1, 0], [2, 2], [1, 3]], 3),
        ([[3, 3], [3, 3], [3, 3]], 3),  # nobody is routed
        ([[0], [0], [0]], 1),  # one expert
        ([[0, 1, 2], [2, 1, 0]], 3),  # every expert
    ],
)
def test_gradients(ids: list[list[int]], experts: int, factor: float) -> None:
    torch.manual_seed(0)
    routing = limit_capacity(routing_of(ids, experts), factor)
    dispatch = Dispatch.from_routing(routing, factor)
    x = torch.randn(len(ids), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dispatch.gather, x)
    assert torch.autograd.gradgradcheck(dispatch.gather, x)

    rows = torch.randn(dispatch.permutation.numel(), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(ids), len(ids[0]), dtype=torch.float64, requires_grad=True)

    def combine(rows: Tensor, weights: Tensor) -> Tensor:
        weights = weights.masked_fill(routing.expert_ids >= experts, 0.0)  # as a router gives them
        return Dispatch(dispatch.permutation, dispatch.inverse, dispatch.counts, dispatch.offsets, weights).combine(
            rows
        )

    assert torch.autograd.gradcheck(combine, (rows, weights))
    assert torch.autograd.gradgradcheck(combine, (rows, weights))


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0])
def test_no_tokens(factor: float) -> None:
    dispatch = Dispatch.from_routing(limit_capacity(empty(), factor), factor)
    assert dispatch.counts.tolist() == [0, 0, 0]
    x = torch.empty(0, 5, requires_grad=True)
    out = dispatch.combine(dispatch.gather(x))
    assert list(out.shape) == [0, 5]
    out.sum().backward()
    assert list(x.grad.shape) == [0, 5]


def test_slots_beyond_the_capacity_are_null() -> None:
    routing = routing_of([[0]] * 6, 3)
    dispatch = Dispatch.from_routing(routing, 1.0)
    assert dispatch.counts.tolist() == [2, 2, 2]
    assert dispatch.permutation.tolist() == [0, 1, 6, 6, 6, 6]
    out = dispatch.combine(dispatch.gather(torch.ones(6, 1, dtype=torch.float64)))
    assert (out[2:] == 0).all()


def test_the_sum_is_float32_in_low_precision() -> None:
    """64 rows of 1 + 1/128 with weight 1/64: a bfloat16 sum would stop growing."""
    ids = torch.arange(64).view(1, 64)
    routing = Routing(ids, torch.full((1, 64), 1 / 64), torch.ones(1, 64))
    dispatch = Dispatch.from_routing(routing)
    rows = torch.full((64, 4), 1 + 1 / 128, dtype=torch.bfloat16)
    assert torch.equal(dispatch.combine(rows), rows[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dispatch.combine(rows), rows[:1])


def test_autocast_does_not_round_the_weights() -> None:
    torch.manual_seed(0)
    routing = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]]), torch.ones(1, 2))
    dispatch = Dispatch.from_routing(routing)
    rows = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = (rows * routing.weights.view(2, 1)).sum(0, keepdim=True)
        torch.testing.assert_close(dispatch.combine(rows), wanted)


class TestShapesThatDoNotDependOnTheData:
    """Under torch.compile, and on a GPU, the null slots stay as rows at the end that belong to nobody."""

    @staticmethod
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def dispatch(ids: Tensor, weights: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        d = Dispatch.from_routing(Routing(ids, weights, scores))
        return d.permutation, d.inverse, d.counts, d.offsets, d.weights

    @given(routing=routings())
    def test_the_tail(self, routing: Routing) -> None:
        compiled = Dispatch(*self.dispatch(routing.expert_ids, routing.weights, routing.scores))
        plain = Dispatch.from_routing(routing)
        rows = plain.permutation.numel()
        assert compiled.permutation.numel() == routing.expert_ids.numel()
        assert torch.equal(compiled.permutation[:rows], plain.permutation)
        assert torch.equal(compiled.offsets, plain.offsets)
        assert (compiled.expert_of_row()[rows:] == routing.num_experts).all()

        x = torch.randn(plain.num_tokens, 3, dtype=torch.float64)
        y = compiled.gather(x)
        y[rows:] = NAN
        y.requires_grad_()
        out = compiled.combine(y)
        torch.testing.assert_close(out, weighted(routing, x))
        out.sum().backward()
        assert (y.grad[rows:] == 0).all()
