"""BigMac: rows go down before they travel to the experts, and up after they have come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests import formulas, reference
from torch import Tensor

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError

D, NARROW, F = 12, 3, 20
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu", "bias": True},
    "shared at full width": {"num_shared_experts": 1},
    "sigmoid": {"router": "sigmoid_topk", "balancing": {"load_balancing": 0.1}},
    "one expert": {"num_experts": 1, "top_k": 1},
    "every expert": {"top_k": 4},
    "as wide as the model": {"communication_width": D},
    "wider": {"communication_width": 2 * D},
}


def layer_of(**changes: Any) -> MoE:
    sizes = {"d_model": D, "d_ff": F, "num_experts": 4, "top_k": 2, "communication_width": NARROW}
    return formulas.layer_of(sizes, **changes)


def bigmac(x: Tensor, parameters: Mapping[str, Tensor], config: MoEConfig) -> tuple[Tensor, Tensor]:
    """x' = x W'↓; y' = Σ_{i ∈ T} p_i(x) E_i(x'); y = y' W'↑ (equation 2): the router reads x at full width."""
    settings = formulas.settings_of(config)

    def answer(token: Tensor, taken: list[int], weights: list[Tensor]) -> Tensor:
        low = parameters["descend.weight"] @ token
        total = 0 * low
        for e, weight in zip(taken, weights, strict=True):
            total = total + weight * reference.expert(low, parameters, e, config.activation)
        return parameters["ascend.weight"] @ total + reference.shared(token, parameters, settings)

    return formulas.routed(x, parameters, settings, answer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_formulas(variant: str) -> None:
    formulas.check_against(bigmac, layer_of(**VARIANTS[variant]))


def test_the_experts_see_narrow_rows() -> None:
    layer = layer_of()
    assert (layer.experts.d_model, layer.experts.d_ff) == (NARROW, F)
    assert list(layer.experts.up.shape) == [4, 2 * F, NARROW]
    # Table 3: two projections more than experts of the same size have, whatever the number of experts.
    extra = sum(p.numel() for name, p in layer.named_parameters() if name.startswith(("descend", "ascend")))
    assert extra == 2 * D * NARROW


def test_no_tokens_and_bf16() -> None:
    layer = layer_of()
    assert list(layer(torch.zeros(0, D, dtype=torch.float64)).shape) == [0, D]
    x = torch.randn(2, 5, D)
    wanted = layer.float()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert reference.relative_error(layer(x), wanted) < 0.05
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_the_backends_agree() -> None:
    formulas.check_the_backends_agree(layer_of())


@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_the_width_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="communication_width"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, communication_width=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projections_begin_with_the_lengths_kept(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = MoE(MoEConfig(d_model=D, d_ff=F, num_experts=4, top_k=2, communication_width=NARROW))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.descend is not None and layer.ascend is not None
    down, up = layer.descend.weight.float(), layer.ascend.weight.float()
    error = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(down @ down.T, torch.eye(NARROW), atol=error, rtol=0)
    torch.testing.assert_close(up.T @ up, torch.eye(NARROW), atol=error, rtol=0)


def test_a_model_draws_its_projections_so_too() -> None:
    config = moesaic.MoesaicConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_intermediate_size=8,
        num_experts=2,
        num_experts_per_tok=1,
        communication_width=4,
        initializer_range=0.02,
    )
    model = moesaic.MoesaicForCausalLM(config)
    down = model.get_submodule("model.layers.0.mlp.descend").weight
    torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-6, rtol=0)
