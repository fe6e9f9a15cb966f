"""Every instruction-set variant that this machine can run, held to float64: outputs and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.experts.native.problems import ISAS, NAMES, TOLERANCE, Problem, error, needs_library

from moesaic.experts import ACTIVATIONS
from moesaic.experts.native import library

pytestmark = needs_library
LAYOUTS: dict[str, dict[str, Any]] = {
    "natural": {},
    "transposed": {"transposed": True},
    "frozen": {"transposed": True, "swapped": True},
    "swapped": {"swapped": True},
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.use_isa(request.param):
        assert library.isa() == request.param
        yield


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_outputs(activation: str, dtype: torch.dtype, layout: str) -> None:
    # Few rows an expert and many, widths that fill vectors and widths that do not, with and without biases.
    sizes = ((1, 64, 32), (9, 48, 33), (70, 33, 20), (150, 96, 64))
    for (tokens, d_model, d_ff), bias in itertools.product(sizes, (False, True)):
        problem = Problem(
            tokens, d_model, d_ff, activation=activation, dtype=dtype, bias=bias, seed=tokens, **LAYOUTS[layout]
        )
        got = problem.run()
        assert got.dtype == dtype and got.is_contiguous()
        assert error(got, problem.wanted()) < TOLERANCE[dtype], (tokens, d_model, d_ff, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_gradients(activation: str, dtype: torch.dtype, layout: str) -> None:
    for (tokens, d_model, d_ff), bias in itertools.product(((1, 16, 24), (9, 33, 20), (80, 64, 48)), (False, True)):
        problem = Problem(
            tokens, d_model, d_ff, activation=activation, dtype=dtype, bias=bias, seed=tokens, **LAYOUTS[layout]
        )
        upstream = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = problem.gradients("native", upstream)
        wanted = problem.gradients("loop", upstream, torch.float64)
        names = [name for name in NAMES if getattr(problem, name) is not None]
        for name, tensor, a, b in zip(names, problem.tensors(), got, wanted, strict=True):
            assert a.dtype == tensor.dtype
            assert error(a, b) < 2 * TOLERANCE[dtype], (name, tokens, d_model, d_ff, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("name", "group"), [("int8", None), ("int4", 32), ("int4", 64)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quantized_weights(dtype: torch.dtype, name: str, group: int | None) -> None:
    for tokens, d_model, d_ff in ((1, 128, 64), (9, 200, 33), (70, 64, 160)):
        problem = Problem(tokens, d_model, d_ff, dtype=dtype, bias=tokens == 9, seed=tokens)
        problem.quantize(name, group)
        got = problem.run()
        assert error(got, problem.wanted()) < TOLERANCE[dtype], (tokens, d_model, d_ff)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_routing_weights_in_other_precisions(weights_dtype: torch.dtype) -> None:
    problem = Problem(weights_dtype=weights_dtype)
    assert error(problem.run(), problem.wanted()) < TOLERANCE[torch.float32]
    upstream = torch.randn(problem.tokens, problem.d_model)
    got, wanted = problem.gradients("native", upstream), problem.gradients("loop", upstream, torch.float64)
    assert got[-1].dtype == weights_dtype
    assert error(got[-1], wanted[-1]) < TOLERANCE[torch.bfloat16]
