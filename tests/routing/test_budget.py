"""The budget of one expert against a loop, and that a router learns to keep it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.reference import relative_error
from torch import Tensor

from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.routing import create_router
from moesaic.routing.budget import Budget


def slow(scores: Tensor, ids: Tensor, expert: int, share: float) -> Tensor:
    """(mean over the tokens that are routed of P_big − b)², one token at a time."""
    total, tokens = scores.new_zeros(()), 0
    for row, chosen in zip(scores, ids.tolist(), strict=True):
        if any(e < scores.shape[1] for e in chosen):
            total, tokens = total + row[expert] / sum(row), tokens + 1
    return (total / max(tokens, 1) - share) ** 2


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
@pytest.mark.parametrize(("experts", "top_k", "expert", "share"), [(3, 1, 1, 0.3), (4, 2, 0, 0.0), (1, 1, 0, 1.0)])
def test_against_a_loop(name: str, experts: int, top_k: int, expert: int, share: float) -> None:
    torch.manual_seed(0)
    router = create_router(name, 6, experts, top_k)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(12, 6, requires_grad=True)
    routing = router(x).without((torch.arange(12) % 5 == 0).unsqueeze(1))
    loss = Budget(expert=expert, share=share).loss(routing, routing.counts())
    wanted = slow(routing.scores.double(), routing.expert_ids, expert, share)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    got = torch.autograd.grad(loss, (x, router.weight), retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(wanted, (x, router.weight)), strict=True):
        assert relative_error(one, other) < 1e-4 or other.abs().max() < 1e-6


def test_no_tokens() -> None:
    router = create_router("softmax_topk", 6, 3, 1)
    routing = router(torch.zeros(0, 6))
    loss = Budget(expert=1, share=0.5).loss(routing, routing.counts())
    loss.backward()
    assert loss.item() == 0.25


def test_a_router_keeps_it() -> None:
    """Small, big or skip: whatever else pulls, the big one is taken as often as it may be."""
    torch.manual_seed(0)
    balancing = {"budget": {"coefficient": 1.0, "expert": 1, "share": 0.25}}
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 8, "num_experts": 2, "top_k": 1, "expert_d_ffs": [4, 32]}
    layer = MoE(MoEConfig(**sizes, zero_computation_experts={"zero": 1}, balancing=balancing))
    layer.router.reset_parameters(1.0)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        layer(torch.randn(256, 16))
        layer.aux_loss.backward()
        optimizer.step()
    layer(torch.randn(2000, 16))
    share = layer.last_routing.counts()[1].item() / 2000
    assert share == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("options", [{"expert": -1}, {"share": 1.5}, {"share": -0.1}, {"shar": 0.1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="budget"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, balancing={"budget": {"coefficient": 1.0, **options}})


def test_an_expert_that_is_not_there() -> None:
    balancing = {"budget": {"coefficient": 1.0, "expert": 2}}
    with pytest.raises(ConfigError, match="the router chooses among 2"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, balancing=balancing)
    MoEConfig(d_model=4, d_ff=4, num_experts=2, zero_computation_experts={"zero": 1}, balancing=balancing)
