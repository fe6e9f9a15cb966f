"""Chain-of-Experts: route, compute, add, route again; against the paper's formulas in loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests import formulas, reference
from torch import Tensor

from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError

D, F = 10, 12
VARIANTS: dict[str, dict[str, Any]] = {
    "twice": {"iterations": 2},
    "three times, sigmoid": {"iterations": 3, "router": "sigmoid_topk"},
    "weights as they are": {"iterations": 2, "router_options": {"normalize": False}},
    "shared": {"iterations": 2, "num_shared_experts": 2, "shared_gate": True},
    "biases": {"iterations": 2, "bias": True, "activation": "relu"},
    "one expert": {"iterations": 3, "num_experts": 1, "top_k": 1},
    "every expert": {"iterations": 2, "top_k": 5},
    "once": {"iterations": 1, "num_shared_experts": 1},
    "balanced": {"iterations": 2, "balancing": {"load_balancing": 0.3, "z_loss": 0.2}},
    "capacity": {"iterations": 2, "capacity_factor": -0.5},
}


def layer_of(**changes: Any) -> MoE:
    layer = formulas.layer_of({"d_model": D, "d_ff": F, "num_experts": 5, "top_k": 2}, **changes)
    with torch.no_grad():
        layer.experts.down.mul_(0.5)
    return layer


def chain(x: Tensor, parameters: Mapping[str, Tensor], config: MoEConfig) -> tuple[Tensor, Tensor]:
    """x⁽⁰⁾ = x; x⁽ᵗ⁾ = Σⱼ Êⱼ(x⁽ᵗ⁻¹⁾) + Σᵢ g_{t,i} Eᵢ(x⁽ᵗ⁻¹⁾) + x⁽ᵗ⁻¹⁾; what is added to x in all, and the losses."""
    settings = formulas.settings_of(config)
    state, aux = x, x.new_zeros(())
    for t in range(config.iterations):
        own = dict(parameters)
        own["router.weight"] = parameters["router.weight" if t == 0 else f"next_routers.{t - 1}.weight"]
        if "router.selection_bias" in parameters and t:
            own["router.selection_bias"] = parameters[f"next_routers.{t - 1}.selection_bias"]
        answer = reference.moe(state, own, settings)
        assert answer.margin > 1e-6
        state, aux = state + answer.output, aux + answer.aux_loss
    return state - x, aux


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_formulas(variant: str) -> None:
    formulas.check_against(chain, layer_of(**VARIANTS[variant]))


class TestWhatIsLeft:
    def test_a_routing_of_each_iteration(self) -> None:
        layer, x = layer_of(iterations=3), torch.randn(20, D, dtype=torch.float64)
        layer(x)
        assert len(layer.last_routings) == 3
        assert layer.last_routing is layer.last_routings[0]
        ids = [routing.expert_ids for routing in layer.last_routings]
        assert not torch.equal(ids[0], ids[1])

    def test_each_router_learns_its_own_bias(self) -> None:
        layer = layer_of(iterations=2, router="sigmoid_topk", balancing={"bias_update": 0.1}).train()
        layer(torch.randn(30, D, dtype=torch.float64))
        wanted = [reference.updated_bias([0.0] * 5, routing.counts().tolist(), 0.1) for routing in layer.last_routings]
        layer.after_step()
        for router, bias in zip(layer.routers, wanted, strict=True):
            assert router.get_buffer("selection_bias").tolist() == pytest.approx(bias)
        assert wanted[0] != wanted[1]
        assert not any(balancing.slot_counts.any() for balancing in layer.balancers)

    def test_masked_tokens_stay_as_they_are(self) -> None:
        layer, x = layer_of(iterations=2), torch.randn(6, D, dtype=torch.float64)
        mask = torch.tensor([True, False, True, True, False, True])
        y = layer(x, token_mask=mask)
        assert not y[~mask].any()
        torch.testing.assert_close(y[mask], layer(x[mask]))

    def test_no_tokens(self) -> None:
        layer = layer_of(iterations=2, balancing={"load_balancing": 0.1})
        assert list(layer(torch.zeros(0, D, dtype=torch.float64)).shape) == [0, D]
        assert len(layer.last_routings) == 2

    def test_tokens_all_alike(self) -> None:
        layer = layer_of(iterations=2)
        y = layer(torch.randn(1, D, dtype=torch.float64).expand(7, D))
        torch.testing.assert_close(y, y[:1].expand(7, D))

    def test_bf16(self) -> None:
        layer, x = layer_of(iterations=2).bfloat16(), torch.randn(8, D).bfloat16()
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.float()(x.float())
        assert reference.relative_error(y, layer(x.float())) < 0.05

    def test_the_backends_agree(self) -> None:
        formulas.check_the_backends_agree(layer_of(iterations=2, num_shared_experts=1))


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_iterations_are_a_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="iterations"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, iterations=value)


def test_routes_given_ahead_are_for_one_iteration() -> None:
    with pytest.raises(ConfigError, match="iterations"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, router="given", iterations=2)
