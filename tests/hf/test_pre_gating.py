"""Pre-gating: routes that are decided before attention, of one block or once for the whole stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.tiny import config_of, model_of, tokens
from torch import Tensor, nn

from moesaic import MoE, MoEConfig, MoesaicForCausalLM, Routing, update_balancing
from moesaic.errors import ConfigError
from moesaic.layer import moe_layers
from moesaic.routing import RoutingContext


def block_inputs(model: MoesaicForCausalLM, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what enters each decoder layer."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in model.model.layers]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def slow_experts(layer: MoE, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Loops over tokens and slots, for swiglu experts."""
    rows = []
    for x, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y = 0 * x
        for e, weight in zip(ids, weights, strict=True):
            h = layer.experts.up[e] @ x
            gate, up = h[: len(h) // 2], h[len(h) // 2 :]
            y = y + weight * (layer.experts.down[e] @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(y)
    return torch.stack(rows)


def slow_choice(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the best K of it, divided by their sum."""
    probabilities = torch.exp(x_TD @ gate_ED.T)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    ids = torch.argsort(probabilities, dim=-1, descending=True)[:, :top_k]
    weights = torch.stack([probabilities[:, e] for e in range(len(gate_ED))], -1).gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True)


def slow_model(model: MoesaicForCausalLM, ids: Tensor) -> Tensor:
    """The whole model, with our MoE layers in loops; attention and norms are transformers' own."""
    body, mode = model.model, model.config.pre_gating
    h = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    embeddings = body.rotary_emb(h, positions)
    mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=h.dtype).triu(1)[None, None]
    chosen: tuple[Tensor, Tensor] | None = None
    for block in body.layers:
        entering = h
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(h), position_embeddings=embeddings, attention_mask=mask
        )
        h = h + attended
        normed = block.post_attention_layernorm(h)
        if not isinstance(block.mlp, MoE):
            h = h + block.mlp(normed)
            continue
        if mode == "layer" or chosen is None:
            chosen = slow_choice(entering.flatten(0, 1), block.mlp.router.weight, 2)
        h = h + slow_experts(block.mlp, normed.flatten(0, 1), *chosen).view(h.shape)
    return model.lm_head(body.norm(h))


@pytest.mark.parametrize("dense", [[], [0]], ids=["all sparse", "first dense"])
@pytest.mark.parametrize("mode", ["layer", "stack"])
def test_against_loops(mode: str, dense: list[int]) -> None:
    model = model_of(pre_gating=mode, mlp_only_layers=dense, num_hidden_layers=3, attn_implementation="eager").double()
    ids = tokens(1, 7)
    logits = model(ids).logits
    upstream = torch.randn(logits.shape, dtype=logits.dtype)
    (logits * upstream).sum().backward()
    got = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wanted = slow_model(model, ids)
    (wanted * upstream).sum().backward()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)  # the router computes in float32
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = got[name]
        assert grad is not None, name
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max() + 1e-3), msg=name)


class TestStack:
    def test_all_layers_take_the_same_experts(self) -> None:
        model = model_of(pre_gating="stack", num_hidden_layers=3)
        model(tokens())
        first, *others = [layer.last_routing for layer in moe_layers(model)]
        for other in others:
            assert torch.equal(other.expert_ids, first.expert_ids)
            assert torch.equal(other.weights, first.weights)

    def test_one_router_only(self) -> None:
        model = model_of(pre_gating="stack", num_hidden_layers=3)
        gates = [name for name, _ in model.named_parameters() if "router" in name]
        assert gates == ["model.layers.0.mlp.router.weight"]

    def test_balancing_counts_once(self) -> None:
        balancing = {"load_balancing": 0.1}
        model = model_of(pre_gating="stack", num_hidden_layers=3, balancing=balancing)
        first = moe_layers(model)[0]
        assert model(tokens()).aux_loss.item() == pytest.approx(first.aux_loss.item())
        assert first.aux_loss.item() > 0

    def test_the_bias_of_the_one_router_moves(self) -> None:
        model = model_of(pre_gating="stack", router="sigmoid_topk", balancing={"bias_update": 0.1}).train()
        model(tokens())
        update_balancing(model)
        assert moe_layers(model)[0].router.get_buffer("selection_bias").any()

    def test_the_routes_are_known_before_the_first_attention(self) -> None:
        for mode in ("layer", "stack"):
            model, order = model_of(pre_gating=mode), []
            block = model.model.layers[0]
            block.mlp.router.register_forward_hook(lambda *_, order=order: order.append("router"))
            block.self_attn.register_forward_hook(lambda *_, order=order: order.append("attention"))
            model(tokens())
            assert order == ["router", "attention"]

    def test_capacity_is_each_layers_own(self) -> None:
        model = model_of(pre_gating="stack", capacity_factor=-0.6)
        model(tokens())
        assert all(int(layer.last_routing.dropped) > 0 for layer in moe_layers(model))


class TestLayer:
    def test_routers_read_what_enters_the_block(self) -> None:
        model = model_of(pre_gating="layer")
        _, inputs = block_inputs(model, tokens())
        for layer, entering in zip(moe_layers(model), inputs, strict=True):
            logits = entering.flatten(0, 1) @ layer.router.weight.T
            torch.testing.assert_close(layer.last_routing.logits, logits)

    def test_without_it_they_read_the_layers_input(self) -> None:
        model = model_of(pre_gating="none")
        _, inputs = block_inputs(model, tokens())
        logits = inputs[0].flatten(0, 1) @ moe_layers(model)[0].router.weight.T
        assert not torch.allclose(moe_layers(model)[0].last_routing.logits, logits)


class TestPadding:
    @pytest.mark.parametrize("mode", ["layer", "stack"])
    def test_padding_gets_no_expert(self, mode: str) -> None:
        model, mask = model_of(pre_gating=mode), torch.ones(2, 12, dtype=torch.int64)
        mask[0, :5] = 0
        with torch.no_grad():
            padded = model(tokens(), attention_mask=mask).logits[0, 5:]
            alone = model(tokens()[:1, 5:]).logits[0]
        for layer in moe_layers(model):
            assert layer.last_routing is not None
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


class TestGiven:
    def layer(self, **changes: Any) -> MoE:
        torch.manual_seed(0)
        return MoE(MoEConfig(**{"d_model": 8, "d_ff": 6, "num_experts": 4, "top_k": 2, "router": "given", **changes}))

    def routing(self, tokens: int = 5, num_experts: int = 4) -> Routing:
        ids = torch.stack([torch.randperm(num_experts)[:2] for _ in range(tokens)])
        return Routing(ids, torch.rand(tokens, 2), torch.rand(tokens, num_experts))

    def test_a_layer_of_ones_own(self) -> None:
        layer, x, routing = self.layer(), torch.randn(5, 8), self.routing()
        y = layer(x, context=RoutingContext(given=routing))
        torch.testing.assert_close(y, slow_experts(layer, x, routing.expert_ids, routing.weights))

    def test_gradients_go_to_whoever_decided(self) -> None:
        routing = self.routing()
        routing.weights.requires_grad_()
        self.layer()(torch.randn(5, 8), context=RoutingContext(given=routing)).sum().backward()
        assert routing.weights.grad is not None and routing.weights.grad.any()

    def test_nothing_is_given(self) -> None:
        with pytest.raises(ConfigError, match="given"):
            self.layer()(torch.randn(5, 8))

    @pytest.mark.parametrize(("tokens", "experts"), [(4, 4), (5, 3)])
    def test_for_other_tokens_or_experts(self, tokens: int, experts: int) -> None:
        with pytest.raises(ConfigError, match="given"):
            self.layer()(torch.randn(5, 8), context=RoutingContext(given=self.routing(tokens, experts)))

    def test_it_learns_nothing(self) -> None:
        assert not list(self.layer().router.parameters())
        assert isinstance(self.layer().router, nn.Module)


def test_a_router_of_the_stack_decides_once() -> None:
    with pytest.raises(ConfigError, match="iterations"):
        config_of(pre_gating="stack", iterations=2)
    with pytest.raises(ConfigError, match="pre_gating"):
        config_of(pre_gating="before")


def test_a_model_needs_a_router_that_decides() -> None:
    with pytest.raises(ConfigError, match="the router 'given' decides nothing, and no layer would: name one that does"):
        config_of(router="given")
