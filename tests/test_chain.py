"""Chain-of-Experts: route, compute, add, route again; against the paper's formulas in loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests import reference
from torch import Tensor

import moesaic
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
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"d_model": D, "d_ff": F, "num_experts": 5, "top_k": 2, **changes}))
    with torch.no_grad():
        for router in layer.routers:
            router.weight.normal_()
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
        layer.experts.down.mul_(0.5)
    return layer.double()


def chain(x: Tensor, parameters: Mapping[str, Tensor], config: MoEConfig) -> tuple[Tensor, Tensor]:
    """x⁽⁰⁾ = x; x⁽ᵗ⁾ = Σⱼ Êⱼ(x⁽ᵗ⁻¹⁾) + Σᵢ g_{t,i} Eᵢ(x⁽ᵗ⁻¹⁾) + x⁽ᵗ⁻¹⁾; what is added to x in all, and the losses."""
    names = reference.Settings.__dataclass_fields__
    settings = reference.Settings(**{name: getattr(config, name) for name in names})
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
    layer = layer_of(**VARIANTS[variant])
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, D, dtype=torch.float64)
    y = layer(x)
    ((y * upstream).sum() + layer.aux_loss).backward()
    parameters = {name: value.detach().double() for name, value in layer.state_dict().items()}
    learned = {name: parameters[name].requires_grad_() for name, _ in layer.named_parameters()}
    again = x.detach().clone().requires_grad_()
    wanted, aux = chain(again, parameters, layer.config)
    ((wanted * upstream).sum() + aux).backward()
    # The router is float32 in every precision.
    assert reference.relative_error(y, wanted) < 1e-5
    assert reference.relative_error(layer.aux_loss, aux) < 1e-5
    assert x.grad is not None and again.grad is not None
    assert reference.relative_error(x.grad, again.grad) < 1e-5
    for name, parameter in layer.named_parameters():
        if learned[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad - learned[name].grad).abs().max() < 1e-5, name


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
        layer, x = layer_of(iterations=2, num_shared_experts=1).float(), torch.randn(16, D)
        answers = []
        for backend in ("loop", "grouped"):
            with moesaic.use_backend(backend):
                answers.append(layer(x))
        torch.testing.assert_close(*answers)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_iterations_are_a_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="iterations"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, iterations=value)


def test_routes_given_ahead_are_for_one_iteration() -> None:
    with pytest.raises(ConfigError, match="iterations"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, router="given", iterations=2)
