"""The layer inside PyTorch's machinery: compile, autocast, checkpointing, functional calls, inference mode."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic import MoE, MoEConfig, update_balancing

BALANCING = {"load_balancing": 0.1, "z_loss": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True, "activation": "gelu"},
    "sigmoid, groups": {"router": "sigmoid_topk", "router_options": {"num_groups": 2, "top_groups": 1}},
    "padded": {"capacity_factor": 0.8},
    "capped": {"capacity_factor": -0.8},
    "shared": {"num_shared_experts": 2, "shared_gate": True},
    "odd sizes": {"d_model": 15, "d_ff": 9, "bias": True},
}


def layer_of(**changes: Any) -> MoE:
    torch.manual_seed(0)
    config = {"d_model": 16, "d_ff": 24, "num_experts": 4, "top_k": 2, "balancing": BALANCING, **changes}
    layer = MoE(MoEConfig(**config))
    layer.router.reset_parameters(0.5)
    for name, parameter in layer.experts.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return layer


def step(layer: Any, x: Tensor, **call: Any) -> list[Tensor]:
    """Output, loss, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, **call)
    (y.float().square().sum() + layer.aux_loss).backward()
    return [y, layer.aux_loss, x.grad, *[p.grad for p in layer.parameters()]]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm() + 1e-7


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_whole_layer_is_one_graph(self, variant: str) -> None:
        layer = layer_of(**VARIANTS[variant])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(12, layer.config.d_model)
        assert_close(step(compiled, x), step(layer, x))
        assert compiled.last_routing.counts().sum() > 0

    @pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
    @pytest.mark.parametrize("backend", ["grouped", "auto"])
    def test_with_inductor(self, backend: str) -> None:
        layer = layer_of(bias=True, d_ff=20)  # 20 float32 values: 16 divides the bytes; 20 bfloat16 values: it does not
        compiled = torch.compile(layer, fullgraph=True)
        with moesaic.use_backend(backend):
            assert_close(step(compiled, torch.ones(9, 16)), step(layer, torch.ones(9, 16)), 1e-4)

    def test_other_numbers_of_tokens_do_not_compile_again_and_again(self) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        layer = layer_of(bias=True)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for tokens in (8, 9, 17, 5, 33, 21, 40):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(compiled(x), layer(x))
        assert counter.frame_count <= 2  # the first size, then any size

    @pytest.mark.parametrize("factor", [1.0, -1.0])
    def test_neither_do_they_with_capacity(self, factor: float) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        layer = layer_of(capacity_factor=factor)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for tokens in (8, 9, 17, 5, 33, 21, 40):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(compiled(x), layer(x))
        assert counter.frame_count <= 2

    def test_settings_of_one_call(self) -> None:
        layer, x = layer_of(), torch.randn(10, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        mask = torch.arange(10) % 3 > 0
        for call in ({"top_k": 1}, {"capacity_factor": 0.5}, {"capacity_factor": -0.5}, {"token_mask": mask}):
            assert_close(step(compiled, x, **call), step(layer, x, **call))

    def test_null_slots_stay_as_rows_that_nobody_computes(self) -> None:
        """The shapes of a compiled layer do not depend on who is masked; the result does not depend on the tail."""
        layer, x = layer_of(bias=True), torch.randn(10, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for hidden in (0, 4, 9, 10):
            mask = torch.arange(10) >= hidden
            assert_close(step(compiled, x, token_mask=mask), step(layer, x, token_mask=mask))

    def test_balancing_counts(self) -> None:
        layer = layer_of(router="sigmoid_topk", balancing={"bias_update": 0.1})
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(torch.randn(10, 16))
        assert int(layer.slot_counts.sum()) == 20
        update_balancing(layer)
        assert layer.router.get_buffer("selection_bias").any()


class TestAutocast:
    @pytest.mark.parametrize("backend", ["loop", "grouped"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_bfloat16(self, variant: str, backend: str) -> None:
        layer = layer_of(**VARIANTS[variant])
        x = torch.randn(12, layer.config.d_model)
        wanted = step(layer, x)
        with moesaic.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            got = step(layer, x)
        assert got[0].dtype == torch.bfloat16
        assert_close([got[0].float(), *got[1:]], wanted, 2e-2)  # gradients are float32, as the parameters
        assert torch.equal(got[1], wanted[1])  # the router does not take part in autocast

    def test_the_backward_may_run_inside(self) -> None:
        layer, x = layer_of(), torch.randn(12, 16)
        with torch.autocast("cpu", torch.bfloat16):
            inside = step(layer, x)
            y = layer(x)
        layer.zero_grad()
        (y.float().square().sum() + layer.aux_loss).backward()
        # Autograd's own matmuls take part in autocast then, the router's among them.
        assert_close(inside[3:], [p.grad for p in layer.parameters()], 1e-2)

    def test_compiled(self) -> None:
        layer, x = layer_of(bias=True), torch.randn(12, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(step(compiled, x), step(layer, x), 1e-2)


class TestCheckpointing:
    @pytest.mark.parametrize("backend", ["loop", "grouped"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_gradients_are_the_same_and_the_loss_keeps_its_own(self, variant: str, backend: str) -> None:
        layer = layer_of(**VARIANTS[variant])
        x = torch.randn(12, layer.config.d_model)
        with moesaic.use_backend(backend):
            wanted = step(layer, x)
            assert_close(step(Checkpointed(layer), x), wanted, 0.0)

        layer.zero_grad()
        y = Checkpointed(layer)(x)
        loss = layer.aux_loss
        loss.backward()  # nothing but the balancing loss
        assert y.requires_grad
        assert layer.router.weight.grad.norm() > 0

    def test_the_bias_moves_as_without(self) -> None:
        biases = []
        for wrap in (lambda layer: layer, Checkpointed):
            layer = layer_of(router="sigmoid_topk", balancing={"bias_update": 0.1})
            wrap(layer)(torch.linspace(-1, 1, 160).view(10, 16).requires_grad_()).sum().backward()
            update_balancing(layer)
            biases.append(layer.router.get_buffer("selection_bias").clone())
        assert torch.equal(*biases)


class Checkpointed(torch.nn.Module):
    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    @property
    def aux_loss(self) -> Tensor:
        return self.layer.aux_loss

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


class TestFunctional:
    @pytest.mark.parametrize("backend", ["loop", "grouped"])
    def test_functional_call(self, backend: str) -> None:
        layer, x = layer_of(bias=True), torch.randn(6, 16)
        other = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}
        with moesaic.use_backend(backend):
            y = torch.func.functional_call(layer, other, x)
            y.square().sum().backward()
            wanted = layer_of(bias=True)
            wanted.load_state_dict({name: p.detach() for name, p in other.items()})
            reference = wanted(x)
            reference.square().sum().backward()
        torch.testing.assert_close(y, reference)
        for name, parameter in wanted.named_parameters():
            torch.testing.assert_close(other[name].grad, parameter.grad)
        assert all(p.grad is None for p in layer.parameters())

    @pytest.mark.parametrize("backend", ["loop", "grouped"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_func_grad(self, variant: str, backend: str) -> None:
        layer = layer_of(**VARIANTS[variant]).eval()  # in training, slots are counted in a buffer
        x = torch.randn(6, layer.config.d_model)
        parameters = dict(layer.named_parameters())

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            y = torch.func.functional_call(layer, parameters, x)
            return y.square().sum() + layer.aux_loss

        with moesaic.use_backend(backend):
            got = torch.func.grad(loss)(parameters)
            wanted = step(layer, x)[3:]
        assert_close([got[name] for name in parameters], wanted)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, backend: str) -> None:
    layer, x = layer_of(bias=True), torch.randn(6, 16)
    with moesaic.use_backend(backend):
        wanted = layer(x)
        with mode():
            y = layer(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, wanted)
        # What was made in inference mode does not stand in the way of training.
        step(layer, x)
        layer.after_step()


def test_frozen_parameters_get_no_gradient() -> None:
    layer, x = layer_of(bias=True), torch.randn(6, 16)
    for backend in ("loop", "grouped"):
        layer.requires_grad_(False)
        layer.experts.down_bias.requires_grad_(True)
        with moesaic.use_backend(backend):
            layer(x).sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["experts.down_bias"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", moesaic.experts.available())
def test_a_trace_routes_other_tokens_anew(backend: str) -> None:
    layer = layer_of().eval().requires_grad_(False)
    x, other = torch.randn(6, 16), torch.randn(6, 16)
    with moesaic.use_backend(backend):
        traced = torch.jit.trace(layer, x, check_trace=False)
        # The loop's slices are numbers of the traced call, as with any Python loop.
        torch.testing.assert_close(traced(x if backend == "loop" else other), layer(x if backend == "loop" else other))
