"""Linear layers, and row invariance of these and of experts, in every instruction-set variant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.experts.native.problems import ISAS, TOLERANCE, Problem, error, needs_library

from moesaic.experts.native import library
from moesaic.experts.native.linear import grouped_linear, linear, refusal
from moesaic.experts.row_invariance import is_row_invariant, row_invariant

pytestmark = [needs_library, pytest.mark.usefixtures("isa")]
SIZES = [(64, 32), (33, 50), (300, 7), (1, 5), (5, 1)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.use_isa(request.param):
        yield


@pytest.mark.parametrize("swapped", [False, True], ids=["inputs last", "outputs last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear(dtype: torch.dtype, swapped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in SIZES:
        weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
        weight = weight.t().contiguous().t() if swapped else weight
        x = torch.randn(3, 90, inputs, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        assert refusal(x, weight, bias) is None
        wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        for rows in (1, 5, 12, 90):
            got = linear(x[:, :rows], weight, bias)
            assert got.dtype == dtype and got.shape == (3, rows, outputs)
            assert error(got, wanted[:, :rows]) < TOLERANCE[dtype], (inputs, outputs, rows)
        assert error(linear(x, weight), wanted - bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("swapped", [False, True], ids=["inputs last", "outputs last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_a_linear_layer_do_not_depend_on_each_other(dtype: torch.dtype, swapped: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for inputs, outputs in SIZES:
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        weight = weight.t().contiguous().t() if swapped else weight
        x = torch.randn(230, inputs, generator=generator).to(dtype)
        together = linear(x, weight, row_invariant=True)
        for first, rows in ((0, 1), (7, 2), (3, 5), (11, 6), (100, 7), (4, 12), (17, 13), (20, 193)):
            alone = linear(x[first : first + rows], weight, row_invariant=True)
            assert torch.equal(alone, together[first : first + rows]), (inputs, outputs, rows)


@pytest.mark.parametrize("swapped", [False, True], ids=["inputs last", "outputs last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_groups_of_rows(dtype: torch.dtype, swapped: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor([0, 3, 0, 40, 1, 0])
    offsets = counts.cumsum(0).int()
    for inputs, outputs in SIZES:
        weight = torch.randn(6, outputs, inputs, generator=generator).to(dtype)
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if swapped else weight
        x = torch.randn(47, inputs, generator=generator).to(dtype)  # three rows more than the groups have
        assert refusal(x, weight) is None
        for alike in (False, True):
            got = grouped_linear(x, weight, offsets, row_invariant=alike)
            assert got.dtype == dtype and not got[44:].any()
            first = 0
            for group, count in enumerate(counts.tolist()):
                rows, one = slice(first, first + count), weight[group]
                assert torch.equal(got[rows], linear(x[rows], one, row_invariant=alike))
                assert error(got[rows], x[rows].double() @ one.double().t()) < TOLERANCE[dtype]
                first += count
    assert not grouped_linear(x, weight, torch.zeros(6, dtype=torch.int32)).any()


@pytest.mark.parametrize("quantized", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_of_an_expert_layer_do_not_depend_on_each_other(dtype: torch.dtype, quantized: str | None) -> None:
    layouts = [{}] if quantized else [{}, {"transposed": True}, {"transposed": True, "swapped": True}]
    for layout in layouts:
        problem = Problem(120, 72, 40, dtype=dtype, bias=True, seed=2, **layout)
        if quantized:
            problem.quantize(quantized, 32 if quantized == "int4" else None)
        with row_invariant():
            assert is_row_invariant()
            together = problem.run()
            assert error(together, problem.wanted()) < TOLERANCE[dtype]
            for first, tokens in ((0, 1), (5, 2), (9, 9), (40, 33), (0, 119)):
                assert torch.equal(problem.part(first, first + tokens).run(), together[first : first + tokens])
        assert not is_row_invariant()


def test_refusals() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    assert "one dtype" in str(refusal(x.half(), weight))
    assert "on a CPU" in str(refusal(x.to("meta"), weight))
    assert "contiguous" in str(refusal(x, torch.zeros(8, 16)[::2, ::2]))
