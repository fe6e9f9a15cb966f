"""Layers with zero-computation experts say the same of a token, to the bit, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.experts.native.problems import needs_library
from torch import Tensor

from moesaic import MoE, MoEConfig
from moesaic.experts.kinds import EXPERT_KINDS, ExpertKind
from moesaic.hf.linears import use_native_linears
from moesaic.routing import RoutingContext
from moesaic.serve.isolation import isolated, needs_no_functions

pytestmark = needs_library
D = 48


@pytest.fixture
def own_kind() -> Iterator[str]:
    @EXPERT_KINDS.register("smooth")
    class Smooth(ExpertKind):
        def forward(self, x_ND: Tensor) -> Tensor:
            return torch.nn.functional.silu(x_ND)

    yield "smooth"
    del EXPERT_KINDS._parts["smooth"]


def layer_of(router: str, kinds: dict[str, int]) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(D, 32, 4, 3, router=router, zero_computation_experts=kinds)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    use_native_linears(layer)
    return layer


@pytest.mark.parametrize("tokens", [3, 65, 130])
@pytest.mark.parametrize(
    ("router", "kinds"), [("null_experts", {"zero": 4}), ("gating_residual", {"constant": 3, "copy": 1})]
)
def test_a_token_is_computed_alone(router: str, kinds: dict[str, int], tokens: int) -> None:
    layer = layer_of(router, kinds)
    x, carried = torch.randn(tokens, D), torch.randn(tokens, layer.config.num_choices)
    with torch.inference_mode():
        light = needs_no_functions(lambda: layer(x[:1]))
        assert light
        with isolated(functions=False):
            together = layer(x, context=RoutingContext(carried=carried))
            for t in range(0, tokens, 1 + tokens // 20):
                alone = layer(x[t : t + 1], context=RoutingContext(carried=carried[t : t + 1]))
                assert torch.equal(together[t : t + 1], alone)


def test_what_a_kind_calls_is_seen_though_nobody_chose_it(own_kind: str) -> None:
    """One token decides for all forwards which functions are watched."""
    layer = layer_of("softmax_topk", {own_kind: 1})
    with torch.no_grad():
        layer.router.weight[-1] = 0
        layer.router.weight[:-1] = 1
    x = torch.ones(1, D)
    with torch.inference_mode():
        assert not needs_no_functions(lambda: layer(x))
    assert layer.last_routing is not None
    assert (layer.last_routing.expert_ids < 4).all()
