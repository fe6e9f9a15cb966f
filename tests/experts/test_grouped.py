"""The grouped matmul: as an operator of PyTorch, and where ``grouped_mm`` does not go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.experts import grouped
from moesaic.experts.grouped import grouped_matmul, grouped_outer


def plain(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """One matmul an expert, in float64."""
    out = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        out[start:end] = x[start:end].double() @ w[expert].double()
        start = end
    return out


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def misaligned(x: Tensor) -> Tensor:
    """The same values at an address that 16 does not divide."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    copy = storage[1:].view(x.shape)
    copy.copy_(x)
    assert copy.data_ptr() % 16 or not x.numel()
    return copy


SIZES = [(16, 24), (7, 5), (1, 1), (8, 3), (3, 8), (64, 32)]
COUNTS = [(4, 0, 9, 3), (0, 0, 0, 0), (0, 0, 0, 5), (16, 0, 0, 0), (1, 1, 1, 1), (40, 1, 33, 70), (0, 32, 64, 37)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "last two swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "misaligned": misaligned,
    "every second column": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "a slice of wider rows": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_values_and_gradients(
    inputs: int, outputs: int, dtype: torch.dtype, counts: tuple[int, ...], tail: int
) -> None:
    torch.manual_seed(0)
    rows = sum(counts) + tail
    x, w, offsets = torch.randn(rows, inputs), torch.randn(4, inputs, outputs), offsets_of(*counts)
    upstream = torch.randn(rows, outputs, dtype=torch.float64)
    for layout in LAYOUTS.values():
        arguments = [layout(t.to(dtype)).detach().requires_grad_() for t in (x, w)]
        doubles = [t.detach().double().requires_grad_() for t in arguments]
        got, wanted = grouped_matmul(*arguments, offsets), plain(*doubles, offsets)
        assert got.dtype == dtype
        assert (got[rows - tail :] == 0).all()
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
        got.backward(upstream.to(dtype))
        wanted.backward(upstream.to(dtype).double())
        for a, b in zip(arguments, doubles, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=TOLERANCE[dtype], atol=16 * TOLERANCE[dtype])


@given(
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    tail=st.integers(0, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
)
def test_any_shape_and_layout(
    inputs: int, outputs: int, counts: list[int], tail: int, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    offsets = offsets_of(*counts)
    x = LAYOUTS[layouts[0]](torch.randn(sum(counts) + tail, inputs).to(dtype))
    w = LAYOUTS[layouts[1]](torch.randn(len(counts), inputs, outputs).to(dtype))
    got = grouped_matmul(x, w, offsets)
    torch.testing.assert_close(got.double(), plain(x, w, offsets), rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


def test_rows_that_belong_to_nobody_are_not_computed_from() -> None:
    """Whatever they hold, forwards and backwards: zeros come out, and nothing reaches a weight."""
    for inputs, outputs in ((8, 12), (3, 5)):  # grouped_mm, and the fallback
        x = torch.randn(6, inputs)
        x[4:] = float("nan")
        x.requires_grad_()
        w = torch.randn(2, inputs, outputs, requires_grad=True)
        out = grouped_matmul(x, w, offsets_of(1, 3))
        assert (out[4:] == 0).all()
        upstream = torch.ones_like(out)
        upstream[4:] = float("nan")
        out.backward(upstream)
        assert w.grad.isfinite().all()
        assert (x.grad[4:] == 0).all()


def test_an_expert_without_rows_gets_a_gradient_of_zero() -> None:
    w = torch.randn(3, 8, 8, requires_grad=True)
    grouped_matmul(torch.randn(5, 8), w, offsets_of(2, 0, 3)).sum().backward()
    assert (w.grad[1] == 0).all()
    assert (w.grad[0] != 0).any()


def test_the_gradient_is_in_the_weights_own_memory_order() -> None:
    for stored in (torch.randn(2, 8, 16), torch.randn(2, 16, 8).transpose(1, 2)):
        w = stored.detach().requires_grad_()
        grouped_matmul(torch.randn(4, 8), w, offsets_of(2, 2)).sum().backward()
        assert w.grad.stride() == stored.stride()


@pytest.mark.parametrize("sizes", [(8, 12), (3, 5)])
def test_gradients_of_both_operators(sizes: tuple[int, int]) -> None:
    x = torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, *sizes, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of(2, 0, 2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, offsets), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_matmul(x, w, offsets), (x, w))
    y = torch.randn(5, sizes[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: grouped_outer(x, y, offsets), (x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(8, 16), (8, 5), (3, 5)])
@pytest.mark.parametrize("stored", ["in_out", "out_in"])
def test_operators_keep_pytorchs_contract(stored: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, outputs = sizes
    x = torch.randn(6, inputs, dtype=dtype)
    shape = (3, inputs, outputs) if stored == "in_out" else (3, outputs, inputs)
    w = torch.randn(shape, dtype=dtype)
    w = w if stored == "in_out" else w.transpose(1, 2)
    torch.library.opcheck(torch.ops.moesaic.grouped_matmul.default, (x, w, offsets_of(2, 0, 3)))
    grad = torch.randn(6, outputs, dtype=dtype)
    torch.library.opcheck(torch.ops.moesaic.grouped_outer.default, (x, grad, offsets_of(2, 0, 3)))


def test_aligned_sizes_do_take_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    original = torch.nn.functional.grouped_mm

    def counted(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(x.dtype)
        return original(x, w, offs=offs)

    monkeypatch.setattr(grouped.F, "grouped_mm", counted)
    for dtype in (torch.float32, torch.bfloat16):
        grouped_matmul(torch.randn(4, 16, dtype=dtype), torch.randn(2, 8, 16, dtype=dtype).mT, offsets_of(2, 2))
    assert calls == [torch.float32, torch.bfloat16]
    grouped_matmul(torch.randn(4, 7), torch.randn(2, 7, 5), offsets_of(2, 2))
    grouped_matmul(misaligned(torch.randn(4, 16)), torch.randn(2, 16, 8), offsets_of(2, 2))
    grouped_matmul(torch.empty(0, 16), torch.randn(2, 16, 8), offsets_of(0, 0))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_half_precision_meets_few_shapes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[tuple[int, ...]] = set()
    original = torch.mm

    def mm(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        met.add((*a.shape, *b.shape))
        return original(a, b, **options)

    monkeypatch.setattr(grouped.torch, "mm", mm)
    w = torch.randn(2, 8, 16, dtype=dtype, requires_grad=True)
    for first in range(100, 160):
        x = torch.randn(300, 8, dtype=dtype, requires_grad=True)
        grouped_matmul(x, w, offsets_of(first, 300 - first)).sum().backward()
    # 60 numbers of rows an expert became three or four: for the output, the gradient of x, and that of w.
    assert len(met) <= 3 * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_neighbour_that_is_not_a_number_stays_with_itself(dtype: torch.dtype) -> None:
    x, w = torch.randn(80, 8, dtype=dtype), torch.randn(2, 8, 16, dtype=dtype)
    offsets = offsets_of(40, 33)  # the last seven rows belong to nobody
    x[40:] = torch.nan
    assert grouped_matmul(x, w, offsets)[:40].isfinite().all()
    assert grouped_outer(x, x, offsets)[0].isfinite().all()
    assert (grouped_matmul(x, w, offsets)[73:] == 0).all()
