"""What the tests of several routers ask alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moesaic.routing import BALANCERS, Router, Routing


def loss_of(balancer: str, routing: Routing) -> Tensor:
    """Of a balancer with its default options, over the routing's own slots."""
    kind: Any = BALANCERS.get(balancer)
    loss: Tensor = kind().loss(routing, routing.counts())
    return loss


def check_choice(routing: Routing, ids: list[list[int]], weights: list[list[Tensor]], mark_E: Tensor) -> Any:
    """The same experts as in the slow version, weighing the same, and null slots behind them.

    Returns:
        The slow version's sum of what the experts say (``mark_E``), each by its weight.
    """
    null, slots = routing.num_experts, routing.top_k
    assert routing.expert_ids.tolist() == [row + [null] * (slots - len(row)) for row in ids]
    total: Any = 0.0
    for row, own, got in zip(ids, weights, routing.weights, strict=True):
        torch.testing.assert_close(got[: len(row)].double(), torch.stack(own), rtol=1e-4, atol=1e-6)
        assert (got[len(row) :] == 0).all()
        total = total + sum(mark_E[e].double() * w for e, w in zip(row, own, strict=True))
    return total


def check_gradients(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """(ours in float32, the slow version's in float64)."""
    for got, want in pairs:
        assert got.grad is not None and want.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4)


def check_half_precision(router: Router) -> None:
    """Features in bfloat16 and autocast change nothing: the gate is in float32 whatever the model is."""
    x = torch.randn(40, router.d_model).bfloat16()
    wide = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = router(x)
    assert torch.equal(narrow.expert_ids, wide.expert_ids)
    assert torch.equal(narrow.weights, wide.weights)
    if wide.logits is not None:
        assert torch.equal(narrow.logits, wide.logits)
    assert narrow.weights.dtype == torch.float32
    assert router.bfloat16()(x).weights.dtype == torch.float32
