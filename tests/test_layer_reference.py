"""The layer against the loops of ``reference.py``: outputs, losses, dropped slots and all gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from tests import reference
from torch import Tensor

import moesaic
from moesaic import MoE, MoEConfig

TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}  # the router is float32 in all of them
BALANCING = {"load_balancing": 0.3, "z_loss": 0.2}
SIGMOID_BALANCING = {**BALANCING, "bias_update": 0.01}
GROUPS = {"num_groups": 3, "top_groups": 2, "scale": 2.5}

# Each row differs from the plain layer in what it names.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights as they are": {"router_options": {"normalize": False}},
    "sigmoid": {"router": "sigmoid_topk", "balancing": SIGMOID_BALANCING},
    "groups": {"router": "sigmoid_topk", "router_options": GROUPS, "balancing": SIGMOID_BALANCING},
    "groups of one": {
        "router": "sigmoid_topk",
        "router_options": {"num_groups": 6, "top_groups": 3, "normalize": False},
    },
    "biases": {"bias": True},
    "geglu": {"activation": "geglu"},
    "geglu_tanh": {"activation": "geglu_tanh"},
    "relu": {"activation": "relu", "bias": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh", "bias": True},
    "shared": {"num_shared_experts": 2},
    "shared, gated, own width": {"num_shared_experts": 1, "shared_d_ff": 5, "shared_gate": True, "bias": True},
    "shared relu": {"num_shared_experts": 3, "activation": "relu"},
    "padded, some dropped": {"capacity_factor": 0.6, "bias": True},
    "padded, none dropped": {"capacity_factor": 6.0, "bias": True},
    "capped": {"capacity_factor": -0.5, "router": "sigmoid_topk"},
    "every expert": {"top_k": 6},
    "one slot": {"top_k": 1, "router_options": {"normalize": False}},
    "one expert": {"num_experts": 1, "top_k": 1},
    "balanced": {"balancing": BALANCING},
    "odd sizes": {"d_model": 7, "d_ff": 5},
}


def layer_of(**changes: Any) -> MoE:
    """A small layer whose router spreads its scores, and whose biases are not zero."""
    layer = MoE(MoEConfig(**{"d_model": 16, "d_ff": 24, "num_experts": 6, "top_k": 2, **changes}))
    with torch.no_grad():
        layer.router.weight.mul_(25)
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
        if "selection_bias" in dict(layer.router.named_buffers()):
            layer.router.get_buffer("selection_bias").uniform_(-0.3, 0.3)
    return layer


def settings_of(config: MoEConfig) -> reference.Settings:
    names = reference.Settings.__dataclass_fields__
    return reference.Settings(**{name: getattr(config, name) for name in names})


def run_layer(layer: MoE, x: Tensor, upstream: Tensor, **call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, **call)
    ((y.double() * upstream).sum() + layer.aux_loss).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return y, {"x": x.grad, **gradients}


def run_reference(
    layer: MoE, x: Tensor, upstream: Tensor, masked: list[bool] | None = None, **changes: Any
) -> tuple[reference.Answer, dict[str, Tensor]]:
    x = x.detach().double().requires_grad_()
    parameters = {name: value.detach().double() for name, value in layer.state_dict().items()}
    learned = {name: parameters[name].requires_grad_() for name, _ in layer.named_parameters()}
    answer = reference.moe(x, parameters, replace(settings_of(layer.config), **changes), masked)
    ((answer.output * upstream).sum() + answer.aux_loss).backward()
    gradients = {name: p.grad for name, p in learned.items() if p.grad is not None}
    return answer, {"x": x.grad, **gradients}


def assert_same(layer: MoE, x: Tensor, tolerance: float, masked: list[bool] | None = None, **call: Any) -> None:
    upstream = torch.randn(x.shape, dtype=torch.float64)
    answer, wanted = run_reference(layer, x, upstream, masked, **call)
    if answer.margin < 1e-5:  # the layer's router is in float32: so near a tie may fall either way
        reject()
    token_mask = None if masked is None else ~torch.tensor(masked, dtype=torch.bool)
    output, got = run_layer(layer, x, upstream, token_mask=token_mask, **call)

    routing = layer.last_routing
    ids = routing.expert_ids.masked_fill(routing.expert_ids == routing.num_experts, reference.NULL)
    assert ids.tolist() == answer.ids
    assert int(routing.dropped or 0) == answer.dropped
    assert output.dtype == x.dtype
    assert error(output, answer.output, floor=0.01 * x.numel() ** 0.5) < tolerance
    assert layer.aux_loss.item() == pytest.approx(answer.aux_loss.item(), rel=1e-5, abs=1e-6)
    # The terms that may cancel out in a gradient are as large as this.
    scale = (answer.output * upstream).abs().sum().item() + max(gradient.norm().item() for gradient in wanted.values())
    for name in wanted.keys() | got.keys():
        # None is what autograd says where a parameter took no part.
        gradient, none = wanted.get(name), torch.zeros(())
        off = error(got.get(name, none), none if gradient is None else gradient, floor=0.01 * scale)
        assert off < tolerance, f"gradient of {name}: {off:.1e}"


def error(got: Tensor, wanted: Tensor, floor: float) -> float:
    """Relative to ‖wanted‖, or to ``floor`` where that is less (one expert's weight is always 1: no gradient)."""
    return (got.double() - wanted).norm().item() / max(wanted.norm().item(), floor, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients(variant: str, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer_of(**VARIANTS[variant]).to(dtype)
    x = torch.randn(11, layer.config.d_model).to(dtype)
    with moesaic.use_backend(backend):
        assert_same(layer, x, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize(
    "call", [{"top_k": 1}, {"top_k": 4}, {"capacity_factor": 0.5}, {"capacity_factor": -1.0}], ids=str
)
def test_settings_of_one_call(call: dict[str, Any], backend: str) -> None:
    torch.manual_seed(1)
    layer = layer_of(balancing=BALANCING, bias=True)
    with moesaic.use_backend(backend):
        assert_same(layer, torch.randn(9, 16), 1e-5, **call)
        assert_same(layer, torch.randn(9, 16), 1e-5)  # and only of that call


@pytest.mark.parametrize("factor", [0.0, 0.7, -0.7])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_masked_tokens(backend: str, factor: float) -> None:
    torch.manual_seed(2)
    layer = layer_of(balancing=BALANCING, bias=True, num_shared_experts=1, capacity_factor=factor)
    masked = [True, False, False, True, False, False, True, True, False]
    with moesaic.use_backend(backend):
        assert_same(layer, torch.randn(9, 16), 1e-5, masked)
        assert_same(layer, torch.randn(9, 16), 1e-5, [True] * 9)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int, list[bool], int]:
    num_experts = draw(st.integers(1, 8))
    router = draw(st.sampled_from(["softmax_topk", "sigmoid_topk"]))
    options: dict[str, Any] = {"normalize": draw(st.booleans())}
    reachable = num_experts
    if router == "sigmoid_topk":
        options["num_groups"] = draw(st.sampled_from([g for g in range(1, 9) if num_experts % g == 0]))
        options["top_groups"] = draw(st.integers(1, options["num_groups"]))
        reachable = num_experts // options["num_groups"] * options["top_groups"]
    changes = {
        "d_model": draw(st.integers(1, 12)),
        "d_ff": draw(st.integers(1, 12)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, reachable)),
        "router": router,
        "router_options": options,
        "balancing": draw(st.sampled_from([{}, BALANCING])),
        "capacity_factor": draw(st.sampled_from([0.0, 0.0, 0.4, 1.0, 2.5, -0.3, -1.0])),
        "activation": draw(st.sampled_from(sorted(reference.FUNCTIONS))),
        "bias": draw(st.booleans()),
        "num_shared_experts": draw(st.integers(0, 2)),
    }
    tokens = draw(st.integers(0, 9))
    return changes, tokens, draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), draw(st.integers(0, 999))


def check(backend: str, case: tuple[dict[str, Any], int, list[bool], int]) -> None:
    changes, tokens, masked, seed = case
    torch.manual_seed(seed)
    layer = layer_of(**changes)
    with moesaic.use_backend(backend):
        assert_same(layer, torch.randn(tokens, layer.config.d_model), 1e-4, masked)  # tiny weights lose digits


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@settings(max_examples=100)
@given(case=cases())
def test_any_shape(backend: str, case: tuple[dict[str, Any], int, list[bool], int]) -> None:
    check(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loop", "grouped"])
@settings(max_examples=3000)
@given(case=cases())
def test_any_shape_at_length(backend: str, case: tuple[dict[str, Any], int, list[bool], int]) -> None:
    check(backend, case)
