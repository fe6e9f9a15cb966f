"""Null slots cut away: the same experts with the same weights, outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic import Dispatch, Routing, layer
from moesaic.routing.compaction import compact


def routing_of(num_tokens: int, num_experts: int, top_k: int, null_share: float, seed: int = 0) -> Routing:
    torch.manual_seed(seed)
    scores_TE = torch.rand(num_tokens, num_experts)
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    return Routing(ids_TK, weights_TK, scores_TE).without(torch.rand(num_tokens, top_k) < null_share)


def pairs(routing: Routing) -> list[list[tuple[int, float]]]:
    """By loops: each token's experts and weights, in the order of its slots."""
    rows = zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)
    return [[(e, w) for e, w in zip(*row, strict=True) if e < routing.num_experts] for row in rows]


@pytest.mark.parametrize("null_share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(64, 16, 16), (300, 6, 4), (1100, 2, 2)])
def test_every_token_keeps_its_experts(shape: tuple[int, int, int], null_share: float) -> None:
    routing = routing_of(*shape, null_share)
    compacted = compact(routing)
    assert pairs(compacted) == pairs(routing)
    most = max(map(len, pairs(routing)))
    assert compacted.top_k == max(1, most)
    null = compacted.expert_ids == routing.num_experts
    assert (compacted.weights[null] == 0).all()
    if compacted is not routing:
        assert (null.long().diff(dim=1) >= 0).all()  # at the end
    assert compacted.scores is routing.scores


def test_what_needs_no_change_is_not_touched() -> None:
    routing = routing_of(300, 6, 4, 0.0)
    assert compact(routing) is routing
    one_full = replace(routing_of(300, 6, 4, 0.9), expert_ids=routing.expert_ids)
    assert compact(one_full) is one_full
    few = routing_of(8, 6, 4, 0.9)
    assert compact(few) is few
    nobody = routing_of(0, 6, 4, 0.9)
    assert compact(nobody) is nobody
    single = routing_of(2000, 6, 1, 0.5)
    assert compact(single) is single


def test_the_slots_of_a_part_keep_other_ids_for_null() -> None:
    """Experts 2 and 3 of 6 as a bank of their own: its null id is 2."""
    routing = routing_of(400, 6, 4, 0.2)
    part = routing.part(range(2, 4))
    compacted = compact(part)
    assert compacted.top_k == 2
    assert pairs(compacted) == pairs(part)


def outputs(x_TD: Tensor, weights_TK: Tensor, routing: Routing, *, cut: bool) -> tuple[Tensor, ...]:
    x_TD, weights_TK = x_TD.detach().requires_grad_(), weights_TK.detach().requires_grad_()
    asked = replace(routing, weights=weights_TK * (routing.expert_ids < routing.num_experts))
    dispatch = Dispatch.from_routing(compact(asked) if cut else asked)
    assert dispatch.top_k == (5 if cut else 12)
    y_TD = dispatch.combine(dispatch.gather(x_TD).tanh())
    y_TD.backward(torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD))
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    return y_TD.detach(), x_TD.grad, weights_TK.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_the_same(dtype: torch.dtype) -> None:
    routing = routing_of(200, 12, 12, 0.85, seed=3)
    null_TK = (routing.expert_ids < 12).cumsum(dim=1) > 5
    routing = routing.without(null_TK)
    x_TD = torch.randn(200, 8).to(dtype)
    plain = outputs(x_TD, routing.weights, routing, cut=False)
    compacted = outputs(x_TD, routing.weights, routing, cut=True)
    assert torch.equal(plain[0], compacted[0])
    assert torch.equal(plain[2], compacted[2])
    # Of the features: a sum over other numbers of slots, so added up in another order.
    torch.testing.assert_close(plain[1], compacted[1])


def test_nothing_is_read_while_compiling() -> None:
    routing = routing_of(300, 6, 6, 0.9)

    def widths(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return compact(Routing(ids_TK, weights_TK, routing.scores)).weights * 2

    compiled = torch.compile(widths, backend="eager", fullgraph=True)
    assert compiled(routing.expert_ids, routing.weights).shape == (300, 6)
    assert widths(routing.expert_ids, routing.weights).shape[1] < 6


@pytest.mark.parametrize("backend", ["loop", "grouped", "native"])
def test_a_layer_with_a_slot_for_each_expert(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend not in moesaic.experts.available():
        pytest.skip(f"{backend} cannot run here")
    torch.manual_seed(0)
    config = moesaic.MoEConfig(d_model=16, d_ff=8, num_experts=16, top_k=16, router="relu", activation="relu")
    moe = moesaic.MoE(config)
    torch.nn.init.normal_(moe.router.weight, std=0.5)
    x_TD = torch.randn(128, 16)
    shift = torch.full((16,), -2.5)  # few logits stay positive
    moe.router.logit_shift = shift
    seen = []
    from_routing = Dispatch.from_routing
    monkeypatch.setattr(
        Dispatch,
        "from_routing",
        staticmethod(lambda routing, factor: seen.append(routing) or from_routing(routing, factor)),
    )
    with moesaic.use_backend(backend):
        found = moe(x_TD)
        found.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in moe.parameters()]
    assert 1 <= seen[0].top_k < 12
    assert moe.last_routing.top_k == 16
    moe.zero_grad()
    monkeypatch.setattr(layer, "compact", lambda routing: routing)
    with moesaic.use_backend(backend):
        expected = moe(x_TD)
        expected.square().sum().backward()
    assert seen[1].top_k == 16
    assert torch.equal(found, expected)
    for gradient, parameter in zip(gradients, moe.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert any((gradient != 0).any() for gradient in gradients)
