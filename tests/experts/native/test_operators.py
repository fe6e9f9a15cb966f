"""The operators inside PyTorch's machinery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.experts.native.problems import Problem, error, needs_library
from torch import Tensor, nn
from torch.autograd import forward_ad

from moesaic import ExpertBank, MoE, MoEConfig, use_backend
from moesaic.experts import BACKENDS, compute
from moesaic.experts.native import backend, call

pytestmark = needs_library


def inputs_of(problem: Problem) -> tuple[Any, ...]:
    """The operators' arguments from x to group."""
    weights, dispatch = problem.expert_weights(), problem.dispatch()
    order = (problem.x, dispatch.permutation, dispatch.offsets, dispatch.weights, weights.up, weights.down)
    scales = (weights.up_scale, weights.down_scale, weights.transposed, weights.activation.name)
    return *order, weights.up_bias, weights.down_bias, *scales, weights.format.group if weights.format else 0


CASES: dict[str, dict[str, Any]] = {
    "natural": {},
    "transposed, biases": {"transposed": True, "bias": True, "activation": "gelu"},
    "frozen": {"transposed": True, "swapped": True},
    "bfloat16": {"dtype": torch.bfloat16, "activation": "geglu_tanh"},
    "width 1": {"d_model": 1, "d_ff": 1},
    "nothing": {"tokens": 0},
}


class TestContract:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("keep", [False, True])
    def test_forward(self, case: str, keep: bool) -> None:
        problem = Problem(**CASES[case])
        torch.library.opcheck(torch.ops.moesaic.experts.default, (*inputs_of(problem), keep))

    @pytest.mark.parametrize("case", CASES)
    def test_forward_with_gradients(self, case: str) -> None:
        problem = Problem(**CASES[case])
        for tensor in problem.tensors():
            tensor.requires_grad_()
        torch.library.opcheck(torch.ops.moesaic.experts.default, (*inputs_of(problem), True))

    @pytest.mark.parametrize("name", ["int8", "int4"])
    def test_quantized(self, name: str) -> None:
        problem = Problem(d_model=130, d_ff=70)
        problem.quantize(name)
        torch.library.opcheck(torch.ops.moesaic.experts.default, (*inputs_of(problem), False))

    @pytest.mark.parametrize("case", CASES)
    def test_backward(self, case: str) -> None:
        problem = Problem(**CASES[case])
        inputs = inputs_of(problem)
        _, pre = torch.ops.moesaic.experts(*inputs, True)
        for wanted in ([True] * 6, [False, True, False, True, False, True], [False] * 6):
            wanted = [each and (problem.bias or index not in (3, 4)) for index, each in enumerate(wanted)]
            arguments = (torch.randn_like(problem.x), pre, *inputs, wanted)
            torch.library.opcheck(torch.ops.moesaic.experts_backward.default, arguments)


def layer_of(**changes: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"d_model": 16, "d_ff": 24, "num_experts": 4, "top_k": 2, **changes}))
    for name, parameter in layer.experts.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return layer


def step(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()]]


@pytest.fixture
def native() -> Iterator[None]:
    with use_backend("native"):
        yield


@pytest.mark.usefixtures("native")
class TestMachinery:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("changes", [{}, {"bias": True, "activation": "gelu"}, {"capacity_factor": 0.8}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_compiled(self, dtype: torch.dtype, changes: dict[str, Any]) -> None:
        layer = layer_of(**changes).to(dtype)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for tokens in (12, 7):
            x = torch.randn(tokens, 16).to(dtype)
            for got, wanted in zip(step(compiled, x), step(layer, x), strict=True):
                assert error(got, wanted) < (1e-6 if dtype == torch.float32 else 2e-2)

    def test_compiled_without_gradients(self) -> None:
        layer, x = layer_of(), torch.randn(9, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert error(compiled(x), layer(x)) < 1e-6

    def test_inference_mode_and_no_grad(self) -> None:
        layer, x = layer_of(), torch.randn(9, 16)
        wanted = layer(x).detach()
        with torch.inference_mode():
            assert error(layer(x), wanted) < 1e-6
        with torch.no_grad():
            assert error(layer(x), wanted) < 1e-6
            assert not layer(x).requires_grad

    def test_autocast(self) -> None:
        layer, x = layer_of(), torch.randn(9, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.experts(x, Problem(9, 16, 24, 4).dispatch())
        assert y.dtype == torch.bfloat16 and y.requires_grad

    def test_second_derivatives(self) -> None:
        found = []
        for name in ("grouped", "native"):
            with use_backend(name):
                layer = layer_of(bias=True, capacity_factor=1.5)
                x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
                (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
                penalty = slope.square().sum()
                # the down projection's bias has no part in the slope of a sum, but in that of a sum of squares
                found.append(torch.autograd.grad(penalty, [x, *layer.parameters()]))
        for wanted, got in zip(*found, strict=True):
            assert error(got, wanted) < 1e-5

    def test_third_derivatives_are_refused(self) -> None:
        layer, x = layer_of(), torch.randn(9, 16, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            curvature.sum().backward()

    def test_function_transforms(self) -> None:
        layer, x = layer_of(bias=True), torch.randn(9, 16)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, parameters, x).square().sum()

        wanted = dict(zip(parameters, step(layer, x)[2:], strict=True))
        for name, got in torch.func.grad(loss)(parameters).items():
            assert error(got, wanted[name]) < 1e-6

    def test_forward_mode_is_refused(self) -> None:
        problem = Problem()
        weights, dispatch = problem.expert_weights(), problem.dispatch()

        def run(x: Tensor) -> Tensor:
            return BACKENDS.get("native").run(x, dispatch, weights)

        with pytest.raises(RuntimeError, match="forward mode AD"):
            torch.func.jvp(run, (problem.x,), (problem.x,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
            run(forward_ad.make_dual(problem.x, problem.x))

    def test_fake_tensors(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            layer = layer_of(capacity_factor=1.0)  # else the number of rows follows from the tokens' values
            y = layer(torch.randn(9, 16))
            y.sum().backward()
            with torch.no_grad():
                assert layer(torch.randn(9, 16)).shape == (9, 16)
        assert y.shape == (9, 16)

    def test_checkpointing(self) -> None:
        layer, x = layer_of(), torch.randn(9, 16)
        wanted = step(layer, x)

        def checkpointed(x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

        checkpointed.zero_grad, checkpointed.parameters = layer.zero_grad, layer.parameters  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(step(checkpointed, x), wanted, strict=True))

    @pytest.mark.parametrize("name", ["int8", "int4"])
    def test_quantized_weights_under_a_gradient(self, name: str) -> None:
        problem = Problem(d_model=40, d_ff=36, bias=True)
        problem.quantize(name)
        plain = problem.expert_weights().dequantize(torch.float32)
        found = []
        for weights, chosen in ((plain, "grouped"), (problem.expert_weights(), "native")):
            copy = problem.copy()
            x, routing_weights = copy.x.requires_grad_(), copy.weights.requires_grad_()
            with use_backend(chosen):
                compute(x, copy.dispatch(), weights).square().sum().backward()
            found.append((x.grad, routing_weights.grad))
        for wanted, got in zip(*found, strict=True):
            assert error(got, wanted) < 1e-5


def test_calls_that_nobody_watches_skip_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    original = call.forward
    monkeypatch.setattr(backend, "experts", lambda arguments: pytest.fail("through the dispatcher"))
    monkeypatch.setattr(call, "forward", lambda arguments, keep: (calls.append(keep), original(arguments, keep))[1])
    problem = Problem()
    problem.run()
    bank = ExpertBank(20, 12, 5)
    with torch.no_grad():
        BACKENDS.get("native").run(problem.x, problem.dispatch(), bank.weights())
    assert calls == [False, False]
