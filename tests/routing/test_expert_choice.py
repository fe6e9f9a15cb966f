"""Expert choice against section 3.2 of its paper, one expert after the other, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.routing import RoutingContext, create_router
from moesaic.routing.expert_choice import ExpertChoice

D, E = 12, 6


def router_of(num_experts: int = E, top_k: int = E, **options: Any) -> ExpertChoice:
    torch.manual_seed(0)
    router = create_router("expert_choice", D, num_experts, top_k, **options)
    assert isinstance(router, ExpertChoice)
    router.reset_parameters(0.4)
    return router


def slow(x: Tensor, gate: Tensor, factor: float, most: int, real: list[bool]) -> tuple[list[Any], list[Any]]:
    """Ids and weights of each token's experts, the greatest first."""
    scores = []
    for token in x:
        exponentials = [torch.exp((token * row).sum()) for row in gate]
        scores.append([value / sum(exponentials) for value in exponentials])
    tokens = [t for t in range(len(x)) if real[t]]
    capacity = min(math.ceil(factor * len(tokens) / len(gate)), len(tokens))
    chosen: list[list[int]] = [[] for _ in x]
    for e in range(len(gate)):
        for t in sorted(tokens, key=lambda t: -scores[t][e].item())[:capacity]:
            chosen[t].append(e)
    ids = [sorted(row, key=lambda e: -scores[t][e].item())[:most] for t, row in enumerate(chosen)]
    return ids, [[scores[t][e] for e in row] for t, row in enumerate(ids)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("factor", "most"), [(2.0, E), (1.0, E), (0.5, E), (2.0, 2), (3.3, 4), (100.0, E)])
def test_is_the_papers_with_its_gradients(factor: float, most: int, masked: bool) -> None:
    router, x = router_of(top_k=most, capacity_factor=factor), torch.randn(31, D, requires_grad=True)
    real = torch.rand(31) > 0.4 if masked else None
    routing = router(x, None, RoutingContext(token_mask=real))
    mark = torch.cat([torch.randn(E), torch.full((1,), 1e9)])  # what each expert says; a null one must not be heard
    (mark[routing.expert_ids] * routing.weights).sum().backward()

    wide, gate = (each.detach().double().requires_grad_() for each in (x, router.weight))
    ids, weights = slow(wide, gate, factor, most, [True] * 31 if real is None else real.tolist())
    assert routing.expert_ids.tolist() == [row + [E] * (most - len(row)) for row in ids]
    total: Any = 0.0
    for row, own, got in zip(ids, weights, routing.weights, strict=True):
        assert (got[len(row) :] == 0).all()
        for e, w, value in zip(row, own, got, strict=False):
            torch.testing.assert_close(value.double(), w, rtol=1e-4, atol=1e-6)
            total = total + mark[e].double() * w
    total.backward()
    for got, want in ((x, wide), (router.weight, gate)):
        assert got.grad is not None and want.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4)


def test_every_expert_has_the_same_load() -> None:
    routing = router_of()(torch.randn(60, D))
    assert routing.counts().tolist() == [20] * E
    assert len((routing.expert_ids < E).sum(dim=1).unique()) > 2
    few = router_of(capacity_factor=1.0)(torch.randn(60, D))
    assert few.counts().tolist() == [10] * E
    assert (few.expert_ids == E).all(dim=1).any()  # a token that nobody chose


def test_a_later_token_changes_who_is_chosen() -> None:
    """Why it is not causal: the first token's experts depend on those after it."""
    router, x = router_of(capacity_factor=1.0), torch.randn(30, D)
    changed = [not torch.equal(router(x[:n]).expert_ids[0], router(x).expert_ids[0]) for n in range(6, 30)]
    assert any(changed)
    assert not router.is_causal
    assert router.is_adaptive


def test_one_expert_takes_all_that_its_capacity_allows() -> None:
    x = torch.randn(10, D)
    assert (router_of(1, 1)(x).expert_ids == 0).all()
    assert router_of(1, 1, capacity_factor=0.5)(x).counts().tolist() == [5]


def test_tokens_that_are_all_alike() -> None:
    routing = router_of(capacity_factor=1.0)(torch.randn(1, D).expand(12, D))
    assert routing.counts().tolist() == [2] * E


@pytest.mark.parametrize("mask", [False, True])
def test_no_tokens(mask: bool) -> None:
    x = torch.randn(0, D, requires_grad=True)
    routing = router_of()(x, None, RoutingContext(token_mask=torch.ones(0, dtype=torch.bool) if mask else None))
    assert routing.expert_ids.shape == (0, E)
    routing.weights.sum().backward()
    nobody = router_of()(torch.randn(5, D), None, RoutingContext(token_mask=torch.zeros(5, dtype=torch.bool)))
    assert (nobody.expert_ids == E).all()


def test_features_of_half_precision_and_autocast_change_nothing() -> None:
    router, x = router_of(), torch.randn(40, D).bfloat16()
    wide = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = router(x)
    assert torch.equal(narrow.expert_ids, wide.expert_ids)
    assert torch.equal(narrow.weights, wide.weights)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_capacity_out_of_range(factor: float) -> None:
    with pytest.raises(ConfigError, match=f"capacity_factor of router 'expert_choice' is {factor}: it must be above 0"):
        create_router("expert_choice", D, E, E, capacity_factor=factor)


def test_padding_takes_no_capacity_in_the_layer() -> None:
    torch.manual_seed(0)
    layer = moesaic.MoE(moesaic.MoEConfig(D, 16, E, E, router="expert_choice"))
    x, mask = torch.randn(2, 12, D), torch.arange(12).expand(2, 12) < 9
    y = layer(x, token_mask=mask)
    assert layer.last_routing is not None
    assert layer.last_routing.counts().tolist() == [6] * E
    torch.testing.assert_close(y[mask], layer(x[mask]))
    assert (y[~mask] == 0).all()
