"""Layers with zero-computation experts: against loops, inside PyTorch's machinery, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import zero_computation
from tests.reference import NULL, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingContext

MIXED = {"constant": 2, "zero": 1, "copy": 1}
HETEROGENEOUS = {"heterogeneous_load_balancing": {"coefficient": 0.5, "tau": 0.6}}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {"zero_computation_experts": MIXED},
    "gating residual": {"router": "gating_residual", "zero_computation_experts": MIXED, "balancing": HETEROGENEOUS},
    "null experts": {
        "router": "null_experts",
        "zero_computation_experts": {"zero": 4},
        "balancing": {"null_load_balancing": 0.5},
    },
    "null experts of all kinds": {
        "router": "null_experts",
        "zero_computation_experts": MIXED,
        "balancing": {"null_load_balancing": 0.5},
    },
    "padded": {"zero_computation_experts": MIXED, "capacity_factor": 0.7, "capacity_tau": 0.5, "bias": True},
    "capped": {"zero_computation_experts": MIXED, "capacity_factor": -0.7, "capacity_tau": 0.5},
    "null, capped": {"router": "null_experts", "zero_computation_experts": {"zero": 4}, "capacity_factor": -0.5},
    "every column": {"zero_computation_experts": MIXED, "top_k": 9},
    "one of each": {"zero_computation_experts": {"copy": 1}, "num_experts": 1, "top_k": 2},
    "only copies": {"zero_computation_experts": {"copy": 3}, "balancing": {"load_balancing": 0.1}},
}


def layer_of(**changes: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"d_model": 12, "d_ff": 16, "num_experts": 5, "top_k": 3, **changes}))
    layer.router.reset_parameters(0.7)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name or "zero_computation" in name:
                parameter.normal_()
    return layer


def step(layer: Any, x: Tensor, upstream: Tensor, **call: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Output, loss and gradient of the input; gradients of the parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, **call)
    ((y.float() * upstream).sum() + layer.aux_loss).backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return [y, layer.aux_loss, x.grad], grads


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(got[0], wanted[0], strict=True):
        assert relative_error(a, b) < tolerance
    assert got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert relative_error(got[1][name], grad) < tolerance or (got[1][name] - grad).norm() < 1e-6, name


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_what_the_formulas_say(variant: str, backend: str) -> None:
    layer = layer_of(**VARIANTS[variant])
    x, upstream = torch.randn(2, 17, 12)
    before = torch.randn(17, layer.config.num_choices) if layer.config.router == "gating_residual" else None
    with moesaic.use_backend(backend):
        got = step(layer, x, upstream, context=RoutingContext(carried=before))

    parameters = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    wide = x.double().requires_grad_()
    answer = zero_computation.moe(wide, parameters, layer.config, None if before is None else list(before.double()))
    assert answer.margin > 1e-5  # else float32 may route otherwise
    ((answer.output * upstream.double()).sum() + answer.aux_loss).backward()
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None and (name in got[1] or p.grad.any())}
    missing = {name: torch.zeros_like(p) for name, p in got[1].items() if name not in grads}
    assert_close(got, ([answer.output.detach(), answer.aux_loss.detach(), wide.grad], grads | missing))
    assert layer.last_routing is not None
    columns = layer.config.num_choices
    assert layer.last_routing.expert_ids.tolist() == [[columns if e == NULL else e for e in row] for row in answer.ids]
    assert layer.last_routing.num_ffn == layer.config.num_experts


@pytest.mark.parametrize("variant", ["gating residual", "null experts"])
def test_padding_is_routed_nowhere(variant: str) -> None:
    layer = layer_of(**VARIANTS[variant])
    x = torch.randn(9, 12)
    hidden = [t % 3 == 0 for t in range(9)]
    y = layer(x, token_mask=~torch.tensor(hidden))
    parameters = {name: value.detach().double() for name, value in layer.named_parameters()}
    answer = zero_computation.moe(x.double(), parameters, layer.config, masked=hidden)
    assert relative_error(y, answer.output) < 1e-5
    assert relative_error(layer.aux_loss, answer.aux_loss) < 1e-5
    assert (y[hidden] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
class TestMachinery:
    def test_compiled_whole(self, variant: str) -> None:
        torch._dynamo.reset()
        layer = layer_of(**VARIANTS[variant])
        x, upstream = torch.randn(2, 11, 12)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got, wanted = step(compiled, x, upstream)[0], step(layer, x, upstream)[0]
        for a, b in zip(got, wanted, strict=True):
            assert relative_error(a, b) < 1e-5
        torch._dynamo.reset()

    def test_autocast(self, variant: str) -> None:
        layer = layer_of(**VARIANTS[variant])
        x, upstream = torch.randn(2, 11, 12)
        wanted = step(layer, x, upstream)
        with torch.autocast("cpu", torch.bfloat16):
            got = step(layer, x, upstream)
        assert got[0][0].dtype == torch.bfloat16
        assert_close(got, wanted, 3e-2)

    def test_bfloat16(self, variant: str) -> None:
        layer = layer_of(**VARIANTS[variant])
        x = torch.randn(11, 12).bfloat16()
        layer.bfloat16()
        got = layer(x)
        assert got.dtype == torch.bfloat16
        assert relative_error(got, layer.float()(x.float())) < 2e-2

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed(self, variant: str, reentrant: bool) -> None:
        layer = layer_of(**VARIANTS[variant] | {"balancing": {}})
        x, upstream = torch.randn(2, 11, 12)
        wanted = step(layer, x, upstream)
        layer.zero_grad()
        again = x.clone().requires_grad_()
        y = checkpoint(layer, again, use_reentrant=reentrant)
        (y * upstream).sum().backward()
        assert relative_error(again.grad, wanted[0][2]) < 1e-6
        for name, parameter in layer.named_parameters():
            if name in wanted[1]:
                assert parameter.grad is not None and relative_error(parameter.grad, wanted[1][name]) < 1e-6

    def test_no_tokens(self, variant: str) -> None:
        y = layer_of(**VARIANTS[variant])(torch.empty(0, 12))
        assert y.shape == (0, 12)

    def test_all_tokens_alike(self, variant: str) -> None:
        layer = layer_of(**VARIANTS[variant] | {"capacity_factor": 0.0})
        y = layer(torch.randn(12).expand(6, 12))
        assert (y - y[0]).abs().max() < 1e-6

    def test_state_dict_round_trip(self, variant: str) -> None:
        layer, other = layer_of(**VARIANTS[variant]), MoE(layer_of(**VARIANTS[variant]).config)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(5, 12)
        assert torch.equal(layer(x), other(x))


def test_rows_that_cost_nothing_reach_no_backend() -> None:
    """What a null or copy expert is chosen for is never gathered for the bank."""
    layer = layer_of(router="null_experts", zero_computation_experts={"zero": 4})
    layer(torch.randn(40, 12))
    assert layer.last_routing is not None and layer.experts.last_counts is not None
    true = int((layer.last_routing.expert_ids < 5).sum())
    assert int(layer.experts.last_counts.sum()) == true < 40 * 3


def test_top_k_of_one_call_may_be_all_columns() -> None:
    layer = layer_of(router="null_experts", zero_computation_experts={"zero": 4})
    layer(torch.randn(3, 12), top_k=9)
    assert layer.last_routing is not None and layer.last_routing.top_k == 9
    with pytest.raises(ConfigError, match="top_k is 10"):
        layer(torch.randn(3, 12), top_k=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_computation_experts": {"skip": 1}}, "unknown expert kind 'skip'"),
        ({"zero_computation_experts": {"copy": -1}}, "of 'copy': it must be a whole number"),
        ({"zero_computation_experts": {"copy": 1}, "top_k": 7}, "top_k is 7"),
        ({"capacity_tau": 0.0}, "capacity_tau is 0.0: it must be finite and above 0"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**changes)
