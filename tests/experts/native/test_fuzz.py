"""Any shape, any routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.experts.native.problems import ISAS, NAMES, TOLERANCE, Problem, error, needs_library
from torch import Tensor

from moesaic.experts import ACTIVATIONS
from moesaic.experts.native import library

pytestmark = needs_library

widths = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 160]))


@st.composite
def problems(draw: st.DrawFn, floats: bool = True) -> Problem:
    num_experts = draw(st.integers(1, 7))
    idle = draw(st.frozensets(st.integers(0, num_experts - 1), max_size=num_experts - 1))
    settings: dict[str, Any] = {
        "tokens": draw(st.one_of(st.integers(0, 12), st.integers(13, 90))),
        "d_model": draw(widths),
        "d_ff": draw(widths),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts - len(idle))),
        "activation": draw(st.sampled_from(ACTIVATIONS.names())),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "bias": draw(st.booleans()),
        "transposed": floats and draw(st.booleans()),
        "swapped": floats and draw(st.booleans()),
        "capacity": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5])),
        "null": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "idle": idle,
        "seed": draw(st.integers(0, 1000)),
    }
    problem = Problem(**settings)
    problem.x = draw(st.sampled_from(VIEWS))(problem.x)
    return problem


VIEWS = [
    lambda x: x,
    lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],  # rows of a wider tensor
    lambda x: x.t().contiguous().t(),
    lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    lambda x: x[:1].expand_as(x) if len(x) else x,  # all tokens in one place
]


def close(got: Tensor, wanted: Tensor, problem: Problem, factor: float = 1.0) -> bool:
    # Sums of few numbers may cancel: what counts is the size that they are sums of.
    floor = TOLERANCE[problem.dtype] * got.numel() ** 0.5 * 0.1
    difference = (got.double() - wanted.double()).norm().item()
    return difference <= factor * max(TOLERANCE[problem.dtype] * wanted.double().norm().item(), floor)


@pytest.mark.parametrize("isa", ISAS)
@given(problem=problems())
def test_outputs(isa: str, problem: Problem) -> None:
    with library.use_isa(isa):
        got = problem.run()
    assert got.shape == (problem.tokens, problem.d_model)
    assert close(got, problem.wanted(), problem)


@pytest.mark.parametrize("isa", ISAS)
@given(problem=problems())
@settings(max_examples=50)
def test_gradients(isa: str, problem: Problem) -> None:
    upstream = torch.randn(problem.tokens, problem.d_model, generator=torch.Generator().manual_seed(0))
    with library.use_isa(isa):
        got = problem.gradients("native", upstream)
    wanted = problem.gradients("loop", upstream.to(problem.dtype), torch.float64)
    names = [name for name in NAMES if getattr(problem, name) is not None]
    for name, a, b in zip(names, got, wanted, strict=True):
        assert close(a, b, problem, factor=8.0), name


@pytest.mark.parametrize("isa", ISAS)
@given(problem=problems(floats=False), quantized=st.sampled_from([("int8", None), ("int4", 32), ("int4", 64)]))
@settings(max_examples=50)
def test_quantized(isa: str, problem: Problem, quantized: tuple[str, int | None]) -> None:
    problem.quantize(*quantized)
    with library.use_isa(isa):
        got = problem.run()
    assert close(got, problem.wanted(), problem)


def test_the_same_expert_twice() -> None:
    problem = Problem(tokens=6, top_k=2)
    problem.ids[:, 1] = problem.ids[:, 0]
    assert error(problem.run(), problem.wanted()) < TOLERANCE[torch.float32]
