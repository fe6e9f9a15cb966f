"""Shapes, weights, calls, and the error that stands beside a speed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moesaic.bench import SHAPES, Shape, Workload, parse_shape
from moesaic.bench.workload import (
    Bank,
    Call,
    active_experts,
    gradient_error,
    make_bank,
    make_banks,
    make_calls,
    relative_error,
    route,
)
from moesaic.errors import ConfigError

TINY = Shape(6, 2, 8, 4)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def output(call: Call, bank: Bank) -> torch.Tensor:
    """Token by token, slot by slot, in float64."""
    out = torch.zeros(call.x.shape, dtype=torch.float64)
    for t, (ids, weights) in enumerate(zip(call.ids.tolist(), call.weights.double(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = F.linear(call.x[t].double(), bank.up[expert].double()).chunk(2)
            out[t] += weight * F.linear(F.silu(gate) * up, bank.down[expert].double())
    return out


def test_shapes_by_name_and_by_sizes() -> None:
    assert parse_shape("A") == Shape(64, 8, 2048, 1024) == parse_shape("E64K8D2048F1024")
    assert str(SHAPES["B"]) == "B"
    assert str(TINY) == "E6K2D8F4"
    assert parse_shape(str(TINY)) == TINY


@pytest.mark.parametrize("text", ["D", "", "a", "E4K5D8F8", "E0K0D8F8", "E4K2D0F8", "E4K2D8", "E4K2D8F8x", "E-4K2D8F8"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="shape"):
        parse_shape(text)


def test_operations_and_bytes_of_a_layer() -> None:
    # gate, up and down: three matrices of 8 x 4
    assert TINY.weights_of_expert() == 96
    assert TINY.flops(rows=10) == 10 * 96 * 2
    assert Workload(TINY, 5).rows() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tokens": 0}, "tokens"), ({"dtype": "int8"}, "dtype"), ({"routing": "round"}, "routing")],
)
def test_wrong_workloads(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**{"shape": TINY, "tokens": 1, **arguments})  # type: ignore[arg-type]


def test_weights_are_normal_and_all_experts_differ() -> None:
    shape = Shape(5, 2, 700, 600)  # 6.3 million weights: more than one block
    bank = make_bank(shape, torch.float32, generator())
    assert bank.up.shape == (5, 1200, 700)
    assert bank.down.shape == (5, 700, 600)
    assert bank.up.std().item() == pytest.approx(700**-0.5, rel=0.01)
    assert bank.down.std().item() == pytest.approx(600**-0.5, rel=0.01)
    for one in range(5):
        for other in range(one):
            assert (bank.up[one] == bank.up[other]).float().mean() < 0.01


def test_banks_are_more_than_a_cache_holds_but_not_without_end() -> None:
    assert len(make_banks(TINY, torch.bfloat16)) == 8
    banks = make_banks(Shape(8, 2, 1024, 1792), torch.bfloat16)  # 88 MB each
    assert sum(bank.nbytes for bank in banks) >= 1 << 29 > sum(bank.nbytes for bank in banks[1:])
    assert not torch.equal(banks[0].up, banks[1].up)


def test_one_token_gets_experts_that_were_not_used_lately() -> None:
    calls = make_calls(Workload(Shape(12, 3, 8, 4), 1), num_banks=2, seed=0)
    for bank in (0, 1):
        ids = torch.cat([call.ids for call in calls if call.bank == bank])
        assert sorted(ids[:4].flatten().tolist()) == list(range(12))
        assert sorted(ids[4:8].flatten().tolist()) == list(range(12))


@pytest.mark.parametrize("num_banks", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_calls_are_fresh_and_go_round_the_banks(tokens: int, num_banks: int) -> None:
    calls = make_calls(Workload(TINY, tokens), num_banks, seed=3)
    assert [call.bank for call in calls] == [i % num_banks for i in range(len(calls))]
    assert len(calls) % num_banks == 0
    for call in calls:
        assert call.x.shape == (tokens, 8)
        assert call.ids.shape == call.weights.shape == (tokens, 2)
        assert (call.ids[:, 0] != call.ids[:, 1]).all()
        torch.testing.assert_close(call.weights.float().sum(-1), torch.ones(tokens), atol=0.02, rtol=0)
    assert not torch.equal(calls[0].x, calls[-1].x)
    again = make_calls(Workload(TINY, tokens), num_banks, seed=3)
    assert all(torch.equal(one.x, other.x) for one, other in zip(calls, again, strict=True))


def test_hot_routing_sends_everyone_to_one_expert() -> None:
    calls = make_calls(Workload(TINY, 50, routing="hot"), 1, seed=0)
    assert all((call.ids == 0).any(-1).all() for call in calls)
    half = route(TINY, 50, 0.5, generator())
    assert (half[:25] == 0).any(-1).all()
    assert not (half[25:] == 0).any(-1).all()


def test_active_experts_are_counted() -> None:
    x = torch.zeros(2, 8)
    calls = [Call(x, torch.tensor([[0, 1], [1, 2]]), x, 0), Call(x, torch.tensor([[0, 5], [0, 5]]), x, 0)]
    assert active_experts(calls) == 2.5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_error_is_that_of_the_output(dtype: str) -> None:
    work = Workload(TINY, 40, dtype)
    bank, call = make_bank(TINY, work.torch_dtype, generator()), make_calls(work, 1, seed=0)[0]
    right = output(call, bank)
    # In the dtype itself: rounding of the output alone is left.
    assert relative_error(right.to(work.torch_dtype), call, bank) < torch.finfo(work.torch_dtype).eps
    assert relative_error((1.25 * right).to(work.torch_dtype), call, bank) == pytest.approx(0.25, rel=0.05)
    assert relative_error(torch.zeros_like(call.x), call, bank) == pytest.approx(1.0)


def test_the_error_of_gradients_is_the_worst_one() -> None:
    work = Workload(TINY, 9, "fp32", backward=True)
    bank, call = make_bank(TINY, torch.float32, generator()), make_calls(work, 1, seed=0)[0]
    leaves = [tensor.double().requires_grad_() for tensor in (call.x, call.weights, bank.up, bank.down)]
    x, weights, up, down = leaves
    out = torch.zeros(9, 8, dtype=torch.float64)
    for t in range(9):
        for k in range(2):
            gate, value = (up[call.ids[t, k]] @ x[t]).chunk(2)
            out[t] = out[t] + weights[t, k] * (down[call.ids[t, k]] @ (F.silu(gate) * value))
    out.backward(call.x.double())
    gradients = [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
    assert gradient_error(gradients, call, bank) < 1e-6
    for index in range(4):
        wrong = [grad * 1.5 if i == index else grad for i, grad in enumerate(gradients)]
        assert gradient_error(wrong, call, bank) == pytest.approx(0.5, rel=1e-3)
