"""What must not change or spread: threads, numbers that are none, memory that belongs to nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.experts.native.problems import ISAS, TOLERANCE, Problem, error, needs_library
from torch import Tensor

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import ACTIVATIONS, BACKENDS, Activation, compute, use_backend
from moesaic.experts.native import library

pytestmark = needs_library


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.use_isa(request.param):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_the_number_of_threads_changes_no_bit(tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, 67, 45, bias=True, dtype=dtype, null=0.2)
    upstream = torch.randn(tokens, 67)
    found: list[list[Tensor]] = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append([problem.run(), *problem.gradients("native", upstream)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [3, 80])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_no_number_stays_with_itself(
    value: float, tokens: int, dtype: torch.dtype, activation: str
) -> None:
    problem = Problem(tokens, 33, 20, dtype=dtype, activation=activation)
    clean = problem.run()
    problem.x[1, 5] = value
    got, wanted = problem.run(), problem.wanted()
    assert not got[1].isfinite().any() if value != value else torch.equal(got[1].isfinite(), wanted[1].isfinite())
    others = torch.arange(tokens) != 1
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 80])
@pytest.mark.parametrize("name", ["up", "down", "up_bias", "down_bias"])
def test_an_expert_that_nobody_takes_has_no_influence(name: str, tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, 33, 20, dtype=dtype, bias=True, idle=frozenset({0, 2, 4}), capacity=0.0)
    clean = problem.run()
    upstream = torch.randn(tokens, 33)
    gradients = problem.gradients("native", upstream)
    with torch.no_grad():
        for expert in (0, 2, 4):
            getattr(problem, name)[expert] = torch.inf
    assert torch.equal(problem.run(), clean)
    assert all(torch.equal(a, b) for a, b in zip(problem.gradients("native", upstream), gradients, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [2, 70])
def test_numbers_that_are_none_in_the_weights_reach_whoever_multiplies_them(tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, 33, 20, dtype=dtype, activation="relu")
    problem.up[1, 3, 4] = torch.nan  # every row of expert 1 multiplies it
    problem.down[3, 7, 2] = torch.inf  # output 7 of expert 3 does, and infinity times zero is no number
    got, wanted = problem.run(), problem.wanted()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())


@pytest.mark.parametrize("tokens", [2, 70])
def test_routing_weights_that_are_no_numbers(tokens: int) -> None:
    problem = Problem(tokens, 33, 20)
    clean = problem.run()
    problem.weights[1, 0] = torch.nan
    got = problem.run()
    others = torch.arange(tokens) != 1
    assert got[1].isnan().all() and torch.equal(got[others], clean[others])


@pytest.mark.parametrize("tokens", [3, 70])
def test_a_null_slot_adds_nothing_whatever_its_weight_is(tokens: int) -> None:
    problem = Problem(tokens, 33, 20, null=0.5)
    clean = problem.run()
    problem.weights[problem.ids == problem.num_experts] = torch.nan
    assert torch.equal(problem.run(), clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_intermediate_values_beyond_half_precision(dtype: torch.dtype) -> None:
    # The hidden values are near 1e5, which float16 does not hold; the output does fit.
    problem = Problem(6, 32, 32, dtype=dtype, activation="relu")
    with torch.no_grad():
        problem.up *= 256
        problem.down /= 256
        problem.x *= 64
    wanted = problem.wanted()
    assert wanted.abs().max() < 1e4
    assert error(problem.run(), wanted) < TOLERANCE[dtype]


def test_nothing_is_routed() -> None:
    for problem in (
        Problem(tokens=0),
        Problem(null=1.0),
        Problem(tokens=0, capacity=1.0),
        Problem(num_experts=1, top_k=1),
    ):
        problem.run()
        upstream = torch.ones(problem.tokens, problem.d_model)
        for gradient, tensor in zip(problem.gradients("native", upstream), problem.tensors(), strict=True):
            assert gradient.shape == tensor.shape
    assert not Problem(null=1.0).run().any()
    problem = Problem(null=1.0, bias=True)
    assert not any(gradient.any() for gradient in problem.gradients("native", torch.ones(9, 20)))


def test_gradients_keep_the_memory_order_of_their_weights() -> None:
    for transposed in (False, True):
        for swapped in (False, True):
            problem = Problem(transposed=transposed, swapped=swapped)
            _, up, down, *_ = problem.gradients("native", torch.ones(9, 20))
            assert up.stride() == problem.up.stride() and down.stride() == problem.down.stride()


def test_only_what_needs_a_gradient_gets_one() -> None:
    for index in range(6):
        problem = Problem(bias=True)
        tensor = problem.tensors()[index].requires_grad_()
        problem.run().sum().backward()
        assert tensor.grad is not None
        assert [each.grad is not None for each in problem.tensors()] == [other == index for other in range(6)]


class TestRefusals:
    def message(self, problem: Problem, **changes: object) -> str:
        weights = replace(problem.expert_weights(), **changes)  # type: ignore[arg-type]
        with use_backend("native"), pytest.raises(UnsupportedError, match="the backend 'native' cannot run") as caught:
            compute(problem.x, problem.dispatch(), weights)
        return str(caught.value)

    def test_dtype(self) -> None:
        problem = Problem(dtype=torch.float64)
        assert "it computes in float32, bfloat16 and float16, and the features are torch.float64" in self.message(
            problem
        )

    def test_activation(self) -> None:
        activation = Activation("custom", True, ACTIVATIONS.get("swiglu").apply)
        assert "it has no activation 'custom'" in self.message(Problem(), activation=activation)

    def test_post_norm(self) -> None:
        assert "normalized" in self.message(Problem(), post_norm=lambda y: y)

    def test_strides(self) -> None:
        problem = Problem()
        sparse = problem.up.repeat_interleave(2, dim=2)[:, :, ::2]
        assert "neither the inputs nor the outputs of up are contiguous" in self.message(problem, up=sparse)

    def test_meta_tensors(self) -> None:
        problem = Problem()
        weights = replace(problem.expert_weights(), up=problem.up.to("meta"), down=problem.down.to("meta"))
        assert "it computes on a CPU" in str(BACKENDS.get("native").refusal(problem.x.to("meta"), weights))

    def test_a_routing_on_another_device(self) -> None:
        problem = Problem()
        dispatch = problem.dispatch()
        dispatch.permutation = dispatch.permutation.to("meta")
        with pytest.raises(ConfigError, match="features are on cpu, but the routing is on meta"):
            BACKENDS.get("native").run(problem.x, dispatch, problem.expert_weights())

    def test_auto_takes_another_one(self) -> None:
        problem = Problem(dtype=torch.float64)
        with use_backend("auto"):
            assert compute(problem.x, problem.dispatch(), problem.expert_weights()).dtype == torch.float64


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_codes_in_another_order_are_refused(name: str) -> None:
    problem = Problem()
    problem.quantize(name)
    weights = problem.expert_weights()
    assert BACKENDS.get("native").refusal(problem.x, weights) is None
    turned = replace(weights, up=weights.up.transpose(1, 2).contiguous().transpose(1, 2))
    assert "the codes of up" in str(BACKENDS.get("native").refusal(problem.x, turned))
