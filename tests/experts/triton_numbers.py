"""What the Triton kernels compute, against the loop in float64.

Run by ``test_triton.py`` in processes of their own: on a GPU where there is one, else in Triton's interpreter, which
has to be asked for before Triton is first imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.reference import relative_error
from torch import Tensor

from moesaic import Routing
from moesaic.dispatch import Dispatch
from moesaic.experts import ACTIVATIONS, Activation, ExpertWeights, compute, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
OPS = torch.ops.moesaic


def slow(value: object) -> Any:
    """A parameter whose kind another one stands for in the quick tests."""
    return pytest.param(value, marks=pytest.mark.slow)


@dataclass
class Case:
    """One call of the experts; ``leaves`` are its inputs by name, on the device."""

    ids: Tensor
    leaves: dict[str, Tensor]
    activation: Activation
    transposed: bool
    num_experts: int
    capacity_factor: float = 0.0

    def dispatch(self, weights_TK: Tensor) -> Dispatch:
        scores = torch.zeros(self.ids.shape[0], self.num_experts, device=self.ids.device)
        return Dispatch.from_routing(Routing(self.ids, weights_TK, scores), self.capacity_factor)

    def run(self, backend: str, leaves: dict[str, Tensor]) -> Tensor:
        named = {name: leaves.get(name) for name in ("up", "down", "up_bias", "down_bias")}
        weights = ExpertWeights(**named, activation=self.activation, transposed=self.transposed)
        with use_backend(backend):
            return compute(leaves["x"], self.dispatch(leaves["weights"]), weights)

    def in_double(self) -> dict[str, Tensor]:
        return {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in self.leaves.items()}


def case(
    dtype: torch.dtype = torch.float32,
    activation: str | Activation = "swiglu",
    transposed: bool = False,
    bias: bool = False,
    sizes: Sequence[int] = (11, 40, 20, 4, 2),
    null: bool = True,
    capacity_factor: float = 0.0,
) -> Case:
    """``sizes``: tokens, D, F, experts, slots a token; with ``null`` some of the slots have no expert."""
    torch.manual_seed(0)
    tokens, d_model, d_ff, experts, top_k = sizes
    act = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    width = 2 * d_ff if act.gated else d_ff
    choice = [torch.randperm(experts + null)[:top_k] for _ in range(tokens)]
    ids = torch.stack(choice) if choice else torch.empty(0, top_k, dtype=torch.int64)
    shapes = {"x": (tokens, d_model), "up": (experts, width, d_model), "down": (experts, d_model, d_ff)}
    if transposed:
        shapes |= {"up": (experts, d_model, width), "down": (experts, d_ff, d_model)}
    if bias:
        shapes |= {"up_bias": (experts, width), "down_bias": (experts, d_model)}
    leaves = {name: (0.3 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
    leaves["weights"] = torch.rand(tokens, top_k).masked_fill(ids == experts, 0.0)
    leaves = {name: leaf.to(DEVICE).requires_grad_() for name, leaf in leaves.items()}
    return Case(ids.to(DEVICE), leaves, act, transposed, experts, capacity_factor)


def check_output(asked: Case) -> None:
    """Without gradients, where a named activation is part of the first kernel."""
    with torch.no_grad():
        got = asked.run("triton", asked.leaves)
        wanted = asked.run("loop", asked.in_double())
    assert got.dtype == asked.leaves["x"].dtype
    assert relative_error(got, wanted) < TOLERANCE[got.dtype]


def check_gradients(asked: Case) -> None:
    doubles = asked.in_double()
    got, wanted = asked.run("triton", asked.leaves), asked.run("loop", doubles)
    dtype = asked.leaves["x"].dtype
    assert relative_error(got, wanted) < TOLERANCE[dtype]
    upstream = torch.randn(got.shape, device=DEVICE).to(dtype)
    got.backward(upstream)
    wanted.backward(upstream.double())
    for name, leaf in asked.leaves.items():
        assert (leaf.grad is None) == (not leaf.requires_grad), name
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert leaf.grad.is_contiguous(), name  # the leaf's own memory order
            assert relative_error(leaf.grad, doubles[name].grad) < TOLERANCE[dtype], name


def softplus_gate(h: Tensor) -> Tensor:
    return torch.nn.functional.softplus(h[..., ::2]) * h[..., 1::2]


CUSTOM = Activation("custom", True, softplus_gate)
ODD = {
    "odd sizes": {"sizes": (11, 37, 19, 3, 2), "bias": True},
    "sizes of one": {"sizes": (1, 1, 1, 1, 1), "null": False},
    "experts without rows": {"sizes": (3, 16, 16, 9, 2)},
    "one expert": {"sizes": (70, 40, 20, 1, 1), "null": False},
    "padding": {"capacity_factor": 1.5, "bias": True},
}


class TestForward:
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
    def test_activations_and_layouts(self, activation: str, transposed: bool) -> None:
        check_output(case(activation=activation, transposed=transposed, bias=activation in ("geglu", "relu")))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        check_output(case(dtype, bias=True))

    @pytest.mark.parametrize("name", ODD)
    def test_odd_cases(self, name: str) -> None:
        check_output(case(**ODD[name]))

    def test_custom_activation(self) -> None:
        check_output(case(activation=CUSTOM))

    def test_zero_tokens(self) -> None:
        asked = case(sizes=(0, 8, 8, 3, 2))
        out = asked.run("triton", asked.leaves)
        out.sum().backward()
        assert out.shape == (0, 8)
        assert all((leaf.grad == 0).all() for leaf in asked.leaves.values())

    def test_only_null_slots(self) -> None:
        asked = case(bias=True)
        asked.ids.fill_(asked.num_experts)
        out = asked.run("triton", asked.leaves)
        out.sum().backward()
        assert (out == 0).all()
        assert all((leaf.grad == 0).all() for leaf in asked.leaves.values())

    def test_inputs_of_any_strides(self) -> None:
        asked = case(bias=True)
        leaves = {name: torch.stack([leaf, leaf], -1).detach() for name, leaf in asked.leaves.items()}
        leaves = {name: leaf[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for name, leaf in leaves.items()}
        leaves["up"] = torch.stack([asked.leaves["up"].detach()] * 2, -1)[..., 1]
        assert not any(leaf.is_contiguous() for leaf in leaves.values())
        with torch.no_grad():
            assert torch.equal(asked.run("triton", leaves), asked.run("triton", asked.leaves))

    def test_nan_goes_where_arithmetic_sends_it(self) -> None:
        asked = case(activation="relu", bias=True)
        unused = asked.num_experts - 1
        asked.ids[asked.ids == unused] = asked.num_experts
        with torch.no_grad():
            clean = asked.run("triton", asked.leaves)
            asked.leaves["x"][3] = torch.nan
            for name in ("up", "down", "up_bias", "down_bias"):
                asked.leaves[name][unused] = torch.nan
            out = asked.run("triton", asked.leaves)
        assert out[3].isnan().all()
        others = torch.arange(out.shape[0], device=DEVICE) != 3
        assert torch.equal(out[others], clean[others])

    @pytest.mark.skipif(DEVICE == "cpu", reason="a copy to the host costs nothing there")
    def test_the_host_waits_for_nothing(self) -> None:
        asked = case(torch.bfloat16)
        for mode in ("default", "error"):  # the first round compiles and tunes
            torch.cuda.set_sync_debug_mode(mode)
            try:
                asked.run("triton", asked.leaves).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


class TestGradients:
    @pytest.mark.parametrize(
        ("activation", "transposed"),
        [
            ("swiglu", True),
            ("gelu_tanh", False),
            pytest.param("swiglu", False, marks=pytest.mark.slow),
            pytest.param("gelu_tanh", True, marks=pytest.mark.slow),
        ],
    )
    def test_activations_and_layouts(self, activation: str, transposed: bool) -> None:
        check_gradients(case(activation=activation, transposed=transposed))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        check_gradients(case(dtype, bias=True))

    @pytest.mark.parametrize("name", ODD)
    def test_odd_cases(self, name: str) -> None:
        check_gradients(case(**ODD[name]))

    def test_custom_activation(self) -> None:
        check_gradients(case(activation=CUSTOM, bias=True))

    @pytest.mark.parametrize("frozen", [("x",), ("up", "up_bias"), ("down", "weights"), ("x", "up", "up_bias", "down")])
    def test_what_needs_no_gradient_gets_none(self, frozen: tuple[str, ...]) -> None:
        asked = case(bias=True)
        for name in frozen:
            asked.leaves[name].requires_grad_(False)
        check_gradients(asked)

    def test_upstream_gradient_without_strides(self) -> None:
        asked, doubles = case(), case().in_double()
        asked.run("triton", asked.leaves).sum().backward()
        asked.run("loop", doubles).sum().backward()
        for name, leaf in asked.leaves.items():
            assert relative_error(leaf.grad, doubles[name].grad) < TOLERANCE[torch.float32], name

    def test_a_second_derivative_is_refused(self) -> None:
        asked = case()
        out = asked.run("triton", asked.leaves)
        (grad,) = torch.autograd.grad(out.square().sum(), asked.leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward()


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments of each kind that the backend gives it."""
    asked = case(bias=True, activation="geglu")
    leaves = {name: leaf.detach() for name, leaf in asked.leaves.items()}
    dispatch = asked.dispatch(leaves["weights"])
    order = (dispatch.permutation, dispatch.inverse, dispatch.offsets)
    x, up, down = leaves["x"], leaves["up"].mT, leaves["down"].mT
    rows = dispatch.permutation.shape[0]
    h_NG, h_NF = x.new_ones(rows, up.shape[2]), x.new_ones(rows, down.shape[1])
    weights = dispatch.weights
    return {
        "up": (OPS.triton_matmul, (x, up, leaves["up_bias"], *order, None, True, False, "")),
        "fused": (OPS.triton_matmul, (x, up, leaves["up_bias"], *order, None, True, False, "geglu")),
        "down": (OPS.triton_matmul, (h_NF, down, leaves["down_bias"], *order, weights, False, True, "")),
        "gradient of x": (OPS.triton_matmul, (h_NG, up.mT, None, *order, None, False, True, "")),
        "gradient of up": (OPS.triton_outer, (x, h_NG, *order, True, False, True)),
        "gradient of down": (OPS.triton_outer, (h_NF, x, *order, False, True, False)),
        "weigh": (OPS.triton_weigh, (h_NF, 2 * h_NF, weights, order[0], order[2])),
        "sum of rows": (OPS.triton_sum_rows, (h_NG, *order, None, False)),
        "weighted sum": (OPS.triton_sum_rows, (x, *order, weights, True)),
    }


class TestOperators:
    @pytest.mark.parametrize(
        "name",
        [slow(name) if name in ("up", "gradient of x", "gradient of down") else name for name in operator_calls()],
    )
    def test_opcheck(self, name: str) -> None:
        operator, arguments = operator_calls()[name]
        torch.library.opcheck(operator.default, arguments)

    def test_rows_that_belong_to_nobody_are_zeros(self) -> None:
        _, arguments = operator_calls()["up"]
        permutation = torch.cat([arguments[3], torch.arange(20, device=DEVICE)])
        bias = torch.ones_like(arguments[2])
        out = OPS.triton_matmul(*arguments[:2], bias, permutation, *arguments[4:])
        rows = arguments[3].shape[0]
        assert (out[rows:] == 0).all() and (out[:rows] != 0).any(dim=1).all()

    def test_two_runs_are_equal(self) -> None:
        first, second = case(torch.bfloat16), case(torch.bfloat16)
        for asked in (first, second):
            asked.run("triton", asked.leaves).sum().backward()
        for name, leaf in first.leaves.items():
            assert torch.equal(leaf.grad, second.leaves[name].grad), name

    @pytest.mark.parametrize("grad", [slow(False), True])
    def test_compiles_into_one_graph(self, grad: bool) -> None:
        """A compiled dispatch keeps its null slots as rows that belong to nobody, as one on a GPU does."""
        plain, traced = case(bias=True), case(bias=True)
        compiled = torch.compile(traced.run, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(grad):
            wanted, got = plain.run("triton", plain.leaves), compiled("triton", traced.leaves)
        torch.testing.assert_close(got, wanted)
        if grad:
            wanted.sum().backward()
            got.sum().backward()
            for name, leaf in plain.leaves.items():
                torch.testing.assert_close(traced.leaves[name].grad, leaf.grad, msg=name)
