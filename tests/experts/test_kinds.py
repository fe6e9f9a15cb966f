"""Experts beside the feed-forward ones: what each says, who is computed, and a kind of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts.kinds import (
    EXPERT_KINDS,
    ConstantExpert,
    ExpertKind,
    ZeroComputationExperts,
    check_kinds,
    columns_of,
)
from moesaic.routing import Routing

D, FFN = 6, 3
KINDS = {"constant": 2, "zero": 1, "copy": 1}


def experts_of(kinds: Mapping[str, int] = KINDS) -> ZeroComputationExperts:
    torch.manual_seed(0)
    experts = ZeroComputationExperts(D, kinds)
    for expert in experts.experts:
        expert.reset_parameters(1.0)
    return experts


def routing_of(tokens: int, kinds: Mapping[str, int] = KINDS, top_k: int = 3, seed: int = 1) -> Routing:
    """Any experts of any kind, null slots among them."""
    generator = torch.Generator().manual_seed(seed)
    columns = FFN + sum(kinds.values())
    ids = torch.rand(tokens, columns + 1, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator).masked_fill(ids == columns, 0.0).requires_grad_()
    return Routing(ids, weights, torch.rand(tokens, columns, generator=generator), num_ffn=FFN)


def slow(x: Tensor, weights: Tensor, ids: list[list[int]], experts: ZeroComputationExperts) -> Tensor:
    """MoE++, its zero, copy and constant experts, token by token."""
    outputs = []
    for token, row, own in zip(x, ids, weights, strict=True):
        y = 0 * token
        for e, weight in zip(row, own, strict=True):
            kind = experts.kinds[e - FFN] if FFN <= e < FFN + len(experts.kinds) else None
            if kind == "copy":
                y = y + weight * token
            elif kind == "constant":
                expert: Any = experts.experts[e - FFN]
                logits = [(line * token).sum().exp() for line in expert.weight]
                y = y + weight * (logits[0] * token + logits[1] * expert.vector) / sum(logits)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "kinds", [KINDS, {"copy": 2}, {"constant": 3}, {"zero": 2, "constant": 1}, {"zero": 3, "copy": 1}], ids=str
)
def test_is_the_papers_with_its_gradients(kinds: dict[str, int]) -> None:
    experts, routing = experts_of(kinds), routing_of(25, kinds)
    x = torch.randn(25, D, requires_grad=True)
    mark = torch.randn(25, D)
    y = experts(x, routing)
    (y * mark).sum().backward()
    got = [y.detach(), x.grad, routing.weights.grad, *[p.grad for p in experts.parameters()]]

    wide = x.detach().double().requires_grad_()
    weights = routing.weights.detach().double().requires_grad_()
    twin = experts_of(kinds).double()
    wanted = slow(wide, weights, routing.expert_ids.tolist(), twin)
    (wanted * mark.double()).sum().backward()
    for a, b in zip(got, [wanted.detach(), wide.grad, weights.grad, *[p.grad for p in twin.parameters()]], strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_zero_experts_alone_are_not_computed_at_all() -> None:
    experts = experts_of({"zero": 4})
    assert experts(torch.randn(3, D), routing_of(3, {"zero": 4})) is None
    assert not list(experts.parameters())


def test_no_tokens() -> None:
    y = experts_of()(torch.empty(0, D), routing_of(0))
    assert y is not None and y.shape == (0, D)


def test_nobody_chose_them() -> None:
    routing = Routing(torch.tensor([[0, 1], [2, 7]]), torch.ones(2, 2), torch.rand(2, 7), num_ffn=FFN)
    experts, x = experts_of(), torch.randn(2, D)
    with torch.no_grad():
        assert (experts(x, routing) == 0).all()
    y = experts(x, routing)
    y.sum().backward()
    # Ranks average gradients: a parameter that has one on some ranks only would hang them.
    assert all(p.grad is not None and (p.grad == 0).all() for p in experts.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    experts, routing, x = experts_of(), routing_of(25), torch.randn(25, D)
    y = experts.to(dtype)(x.to(dtype), routing)
    assert y.dtype == dtype
    wanted = slow(x.double(), routing.weights.double(), routing.expert_ids.tolist(), experts.double())
    assert (y.double() - wanted).norm() <= 2e-2 * wanted.norm()


def test_autocast_keeps_the_dtype_of_the_features() -> None:
    experts, routing, x = experts_of(), routing_of(25), torch.randn(25, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, routing)
    assert y.dtype == torch.float32
    assert (y - experts(x, routing)).norm() <= 2e-2 * y.norm()


def test_compiled_it_is_the_same() -> None:
    torch._dynamo.reset()
    experts = experts_of()
    compiled: Any = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (25, 3):
        x, routing = torch.randn(tokens, D), routing_of(tokens)
        torch.testing.assert_close(compiled(x, routing), experts(x, routing))
    torch._dynamo.reset()


class TestOwnKind:
    @pytest.fixture(autouse=True)
    def kind(self) -> Iterator[None]:
        calls = self.calls = []  # type: ignore[var-annotated]

        @EXPERT_KINDS.register("double")
        class Double(ExpertKind):
            def forward(self, x_ND: Tensor) -> Tensor:
                calls.append(x_ND.shape[0])
                return 2 * x_ND

        yield
        del EXPERT_KINDS._parts["double"]

    def test_only_tokens_that_chose_it_are_computed(self) -> None:
        experts = ZeroComputationExperts(D, {"zero": 1, "double": 2})
        routing = Routing(
            torch.tensor([[0, 3], [4, 5], [3, 1], [6, 6]]), torch.full((4, 2), 0.5), torch.rand(4, 6), num_ffn=FFN
        )
        x = torch.randn(4, D)
        torch.testing.assert_close(experts(x, routing), x * torch.tensor([[1.0], [1.0], [1.0], [0.0]]))
        assert self.calls == [2, 1]

    def test_nobody_is_called_for_nobody(self) -> None:
        experts = ZeroComputationExperts(D, {"double": 2})
        with torch.no_grad():
            experts(torch.randn(1, D), Routing(torch.tensor([[3]]), torch.ones(1, 1), torch.rand(1, 5), num_ffn=FFN))
        assert self.calls == [1]


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"unknown expert kind 'const': did you mean 'constant'\?"):
        check_kinds({"const": 1})
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="of 'copy': it must be a whole number from 0 on"):
            ZeroComputationExperts(D, {"copy": wrong})  # type: ignore[dict-item]


def test_the_order_of_the_mapping_does_not_matter() -> None:
    """A configuration that has been to a file and back has its keys in another order."""
    assert columns_of({"zero": 1, "constant": 2, "copy": 0}) == ["constant", "constant", "zero"]
    assert experts_of({"zero": 1, "constant": 2}).kinds == experts_of({"constant": 2, "zero": 1}).kinds


def test_names_of_the_parameters() -> None:
    assert list(experts_of().state_dict()) == [
        f"experts.{index}.{name}" for index in (0, 1) for name in ("vector", "weight")
    ]
    assert isinstance(experts_of().experts[0], ConstantExpert)
    assert str(experts_of()).startswith("ZeroComputationExperts(\n  constant=2, copy=1, zero=1")
