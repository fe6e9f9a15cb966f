"""Weights that begin at 1, and how they are learned, against a slow reference."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.experts.activations import ACTIVATIONS
from moesaic.layer import MoE, MoEConfig
from moesaic.routing import create_router
from moesaic.routing.unit_topk import UnitTopK


def router_of(num_experts: int = 6, top_k: int = 3, *, straight_through: bool = False) -> UnitTopK:
    torch.manual_seed(0)
    router = create_router("unit_topk", 16, num_experts, top_k, straight_through=straight_through)
    router.reset_parameters(0.5)
    assert isinstance(router, UnitTopK)
    with torch.no_grad():
        router.bias.normal_()
    return router


@pytest.mark.parametrize("straight_through", [False, True])
def test_weights_begin_at_one_and_the_largest_logits_win(straight_through: bool) -> None:
    router, x_TD = router_of(straight_through=straight_through), torch.randn(20, 16)
    routing = router(x_TD)
    assert torch.equal(routing.weights, torch.ones(20, 3))
    for t in range(20):
        logits = [
            sum(w * v for w, v in zip(row, x_TD[t].tolist(), strict=True)) + b
            for row, b in zip(router.weight.tolist(), router.bias.tolist(), strict=True)
        ]
        order = sorted(range(6), key=lambda e: -logits[e])
        assert routing.expert_ids[t].tolist() == order[:3]
        assert routing.scores[t].tolist() == pytest.approx([1 / (1 + math.exp(-l)) for l in logits], rel=1e-4)


def test_learned_scales_weigh_by_the_centred_score() -> None:
    router, x_TD = router_of(), torch.randn(20, 16)
    with torch.no_grad():
        router.scale.normal_()  # type: ignore[union-attr]
    routing = router(x_TD)
    for t in range(20):
        for k, e in enumerate(routing.expert_ids[t].tolist()):
            score = 1 / (1 + math.exp(-float(routing.logits.detach()[t, e])))
            expected = 1 + float(router.scale.detach()[e]) * (2 * score - 1)  # type: ignore[union-attr]
            assert float(routing.weights.detach()[t, k]) == pytest.approx(expected, abs=1e-5)


def test_scales_learn_first_and_then_the_gate() -> None:
    router, x_TD = router_of(), torch.randn(20, 16)
    gain_TK = torch.randn(20, 3)
    (router(x_TD).weights * gain_TK).sum().backward()
    assert router.scale is not None and router.scale.grad is not None and router.scale.grad.abs().sum() > 0
    assert router.weight.grad is not None and router.weight.grad.abs().sum() == 0
    with torch.no_grad():
        router.scale -= router.scale.grad
    (router(x_TD).weights * gain_TK).sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_straight_through_gives_the_gradient_of_the_score() -> None:
    router, x_TD = router_of(straight_through=True), torch.randn(20, 16)
    gain_TK = torch.randn(20, 3)
    routing = router(x_TD)
    (routing.weights * gain_TK).sum().backward()
    expected = torch.zeros(6, 16, dtype=torch.float64)
    for t in range(20):
        for k, e in enumerate(routing.expert_ids[t].tolist()):
            score = 1 / (1 + math.exp(-float(routing.logits.detach()[t, e])))
            expected[e] += float(gain_TK[t, k]) * score * (1 - score) * x_TD[t].double()
    assert router.weight.grad is not None
    torch.testing.assert_close(router.weight.grad.double(), expected, rtol=1e-4, atol=1e-5)
    assert router.scale is None
    assert "straight_through=True" in repr(router)


@pytest.mark.parametrize("straight_through", [False, True])
def test_all_experts_on_are_one_dense_feed_forward(straight_through: bool) -> None:
    options = {"straight_through": straight_through}
    torch.manual_seed(0)
    layer = MoE(MoEConfig(16, 8, 4, top_k=4, router="unit_topk", router_options=options))
    x_TD = torch.randn(10, 16)
    up_GD = torch.cat([layer.experts.up[:, :8].reshape(32, 16), layer.experts.up[:, 8:].reshape(32, 16)])
    down_DF = layer.experts.down.permute(1, 0, 2).reshape(16, 32)
    dense_TD = ACTIVATIONS.get("swiglu").apply(x_TD @ up_GD.T) @ down_DF.T
    torch.testing.assert_close(layer(x_TD), dense_TD, rtol=1e-5, atol=1e-5)


def test_top_k_of_one_call_half_precision_and_no_tokens() -> None:
    router = router_of()
    assert router(torch.randn(5, 16), top_k=6).weights.shape == (5, 6)
    assert router(torch.randn(0, 16)).weights.shape == (0, 3)
    routing = router.bfloat16()(torch.randn(5, 16).bfloat16())
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
