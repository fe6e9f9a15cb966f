"""Hybrid routing by Tsallis entropy, against a reference of plain loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import BALANCERS, Router, Routing, create_router
from moesaic.routing.tsallis import tsallis_entropy

NULL = -1
OPTIONS: dict[str, Any] = {"threshold": 0.9, "entropy_index": 1.1, "p": 0.75, "least": 2, "normalize": False}


def added(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def softmax(token: Tensor, weight: Tensor) -> list[Tensor]:
    powers = [(token * row).sum().exp() for row in weight]
    total = added(powers)
    return [power / total for power in powers]


def entropy(p: list[Tensor], q: float) -> Tensor:
    """Of one token, as a share of the greatest that there is."""
    if len(p) == 1:
        return torch.zeros_like(p[0])
    if q == 1:
        terms = [-value * value.log() for value in p]
        return added(terms) / math.log(len(p))
    powers = [value**q for value in p]
    greatest: float = (1 - len(p) * (1 / len(p)) ** q) / (q - 1)
    return (1 - added(powers)) / (q - 1) / greatest


def route(
    token: Tensor, weight: Tensor, top_k: int, options: dict[str, Any]
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """The slots, the weights and the distribution of one token."""
    o = {**OPTIONS, **options}
    p = softmax(token, weight)
    order = sorted(range(len(p)), key=lambda e: -p[e].item())[:top_k]
    if entropy(p, o["entropy_index"]).item() > o["threshold"]:
        taken = order
    else:
        taken, total = [], 0.0
        for e in order:
            if total >= o["p"] and len(taken) >= o["least"]:
                break
            taken.append(e)
            total += p[e].item()
    weights = [p[e] for e in taken]
    if o["normalize"]:
        weights = [value / added(weights) for value in weights]
    missing = top_k - len(taken)
    return taken + [NULL] * missing, weights + [0 * p[0]] * missing, p


def build(num_experts: int = 8, top_k: int = 8, std: float = 0.4, **options: Any) -> Router:
    torch.manual_seed(0)
    router = create_router("tsallis", 16, num_experts, top_k, **options)
    router.reset_parameters(std)
    return router


def balancer(**options: Any) -> Any:
    return BALANCERS.get("tsallis_entropy")(**options)


def ids_of(routing: Routing) -> list[list[int]]:
    return [[NULL if e == routing.num_experts else e for e in row] for row in routing.expert_ids.tolist()]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "options"),
    [
        (8, 8, {}),
        (8, 4, {}),
        (8, 8, {"entropy_index": 2.0, "threshold": 0.8, "normalize": True}),
        (8, 8, {"entropy_index": 0.5, "least": 3, "p": 0.3}),
        (8, 8, {"entropy_index": 1.0, "least": 1, "p": 0.5}),
        (8, 1, {}),
        (1, 1, {}),
        (3, 3, {"threshold": 1.0, "p": 1.0}),
    ],
)
def test_against_the_reference(num_experts: int, top_k: int, options: dict[str, Any]) -> None:
    router = build(num_experts, top_k, **options)
    x = torch.randn(40, 16, requires_grad=True)
    index = options.get("entropy_index", 1.1)
    entropy_loss = balancer(entropy_index=index)
    routing = router(x)
    loss = entropy_loss.loss(routing, routing.counts())

    x64 = x.detach().double().requires_grad_()
    weight64 = router.weight.detach().double().requires_grad_()
    rows = [route(token, weight64, top_k, options) for token in x64]
    weights64 = torch.stack([torch.stack(weights) for _, weights, _ in rows])
    entropies = [entropy(p, index) for _, _, p in rows]
    loss64 = added(entropies) / len(rows)

    assert ids_of(routing) == [ids for ids, _, _ in rows]
    torch.testing.assert_close(routing.weights.double(), weights64, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-4, atol=1e-6)
    pull = torch.randn(40, top_k, dtype=torch.float64)
    ((routing.weights * pull.float()).sum() + 3 * loss).backward()
    ((weights64 * pull).sum() + 3 * loss64).backward()
    for ours, theirs in ((x, x64), (router.weight, weight64)):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


def test_the_reference_sees_all_three_ways() -> None:
    """Else the comparison above would not compare much."""
    counts = (build()(torch.randn(40, 16)).expert_ids < 8).sum(dim=1)
    assert {2, 8} < set(counts.tolist())


def test_undecided_tokens_take_all_experts_and_decided_ones_few() -> None:
    router = build(least=1)
    undecided = router(torch.zeros(5, 16))
    assert ids_of(undecided) and all(sorted(row) == list(range(8)) for row in ids_of(undecided))
    decided = router(router.weight[:1].detach() * 100)
    assert (decided.expert_ids < 8).sum() == 1
    assert decided.weights[0, 0] > 0.75 and (decided.weights[0, 1:] == 0).all()


def test_all_tokens_alike_are_routed_alike_and_none_is_no_trouble() -> None:
    router = build()
    routing = router(torch.randn(1, 16).expand(6, 16))
    assert (routing.expert_ids == routing.expert_ids[0]).all()
    empty = router(torch.zeros(0, 16))
    assert list(empty.expert_ids.shape) == [0, 8]
    loss = balancer().loss(empty, empty.counts())
    assert loss == 0


def test_top_k_of_one_call_limits_also_soft_routing() -> None:
    assert build()(torch.zeros(3, 16), 5).expert_ids.shape == (3, 5)
    assert (build()(torch.zeros(3, 16), 5).expert_ids < 8).all()


def test_bf16_features_are_routed_in_float32() -> None:
    router, x = build(), torch.randn(30, 16, dtype=torch.bfloat16)
    routing = router(x)
    assert routing.weights.dtype == routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.weights, router(x.float()).weights)


def test_entropy_is_between_none_and_all() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], requires_grad=True)
    for index in (0.5, 1.0, 1.1, 2.0):
        values = tsallis_entropy(p, index)
        torch.testing.assert_close(values.detach(), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(values.sum(), p)
        assert gradient.isfinite().all()


def test_padding_does_not_count_in_the_loss() -> None:
    entropy_loss = balancer()
    routing = build()(torch.randn(6, 16))
    hidden = torch.tensor([False, True, False, False, True, False])
    kept = build()(torch.randn(6, 16))
    kept.scores = routing.scores[~hidden]
    kept.expert_ids = routing.expert_ids[~hidden]
    masked = routing.without(hidden.unsqueeze(1))
    torch.testing.assert_close(entropy_loss.loss(masked, masked.counts()), entropy_loss.loss(kept, kept.counts()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p is 1.5"),
        ({"p": -0.1}, "p is -0.1"),
        ({"least": 0}, "least is 0"),
        ({"entropy_index": 0.0}, "entropy_index is 0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)
    if "entropy_index" in options:
        with pytest.raises(ConfigError, match=message):
            balancer(**options)


def test_scores_that_do_not_sum_to_one_are_normalized() -> None:
    torch.manual_seed(0)
    router = create_router("sigmoid_topk", 16, 4, 2)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(6, 16))
    wanted = 0.0
    for row in routing.scores.double():
        wanted += (
            entropy([p / row.sum() for p in row], 1.1).item() / entropy([row.new_tensor(0.25)] * 4, 1.1).item() / 6
        )
    assert balancer().loss(routing, routing.counts()).item() == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted < 1
