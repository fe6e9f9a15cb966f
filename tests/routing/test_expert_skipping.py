"""Experts that matter little beside a token's best one are skipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import Router, create_router


def router(num_experts: int = 8, top_k: int = 4, **options: Any) -> Router:
    torch.manual_seed(0)
    made = create_router("expert_skipping", 6, num_experts, top_k, **options).double()
    made.reset_parameters(0.5)
    return made


def reference(x_TD: Tensor, weight_ED: Tensor, top_k: int, ratio: float, normalize: bool) -> list[dict[int, Tensor]]:
    """Expert to weight, token by token, in the order of preference; keeps the graph."""
    tokens = []
    for x_D in x_TD:
        exponents = [(x_D * row_D).sum().exp() for row_D in weight_ED]
        p = [e / sum(exponents) for e in exponents]
        order = sorted(range(len(p)), key=lambda i: -p[i].item())[:top_k]
        kept = [i for i in order if p[i].item() >= ratio * p[order[0]].item()]
        total = sum(p[i] for i in kept) if normalize else torch.ones(())
        tokens.append({i: p[i] / total for i in kept})
    return tokens


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_reference_and_gradients(ratio: float, normalize: bool) -> None:
    made = router(ratio=ratio, normalize=normalize)
    x_TD = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    routing = made(x_TD)
    expected = reference(x_TD.float().double(), made.weight.float().double(), 4, ratio, normalize)
    output = torch.randn(8, dtype=torch.float64)  # what an expert says
    loss = torch.zeros((), dtype=torch.float64)
    for token, weights in enumerate(expected):
        used = len(weights)
        assert routing.expert_ids[token].tolist() == [*weights, *[8] * (4 - used)]
        assert routing.weights[token].tolist() == pytest.approx(
            [*(w.item() for w in weights.values()), *[0] * (4 - used)], rel=1e-5
        )
        loss = loss + sum(weight.square() * output[i] for i, weight in weights.items())
    wanted = torch.autograd.grad(loss, [x_TD, made.weight])
    said = torch.cat([output, torch.zeros(1)])[routing.expert_ids]
    got = torch.autograd.grad((routing.weights.double().square() * said).sum(), [x_TD, made.weight])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_edges() -> None:
    assert router(ratio=0.5)(torch.zeros(0, 6)).expert_ids.shape == (0, 4)
    alike = router(ratio=1.0)(torch.zeros(3, 6))  # all experts are equally good: none is skipped
    assert (alike.expert_ids < 8).all()
    assert torch.equal(alike.weights, torch.full((3, 4), 0.25))
    one = router(num_experts=1, top_k=1)(torch.randn(5, 6))
    assert torch.equal(one.weights, torch.ones(5, 1))
    every = router(top_k=8, ratio=0.0)(torch.randn(5, 6))
    assert (every.expert_ids.sort(dim=1).values == torch.arange(8)).all()
    half = router()(torch.randn(5, 6, dtype=torch.bfloat16))
    assert half.weights.dtype == torch.float32 and half.scores.dtype == torch.float32


def test_the_best_expert_is_never_skipped() -> None:
    routing = router(ratio=1.0)(torch.randn(50, 6))
    assert torch.equal(routing.weights[:, 0], torch.ones(50))
    assert (routing.counts().sum() == 50).item()


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ConfigError, match=f"ratio is {ratio}"):
        router(ratio=ratio)
    with pytest.raises(ConfigError, match="finite"):
        router(ratio=math.nan)
