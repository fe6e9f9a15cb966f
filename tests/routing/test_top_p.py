"""Top-p routing against sections 3.2 and 3.3 of its paper, one token after the other, in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from tests.routing.comparing import check_choice, check_gradients, check_half_precision, loss_of
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import create_router
from moesaic.routing.top_p import TopP

D, E = 12, 8


def router_of(num_experts: int = E, top_k: int = E, **options: Any) -> TopP:
    torch.manual_seed(0)
    router = create_router("top_p", D, num_experts, top_k, **options)
    assert isinstance(router, TopP)
    router.reset_parameters(0.4)
    return router


entropy_of = partial(loss_of, "entropy")


def slow(x: Tensor, gate: Tensor, p: float, most: int, normalize: bool) -> tuple[list[Any], ...]:
    """Ids and weights of the experts that are taken, and all probabilities."""
    ids, weights, probabilities = [], [], []
    for token in x:
        exponentials = [torch.exp((token * row).sum()) for row in gate]
        chances = [value / sum(exponentials) for value in exponentials]
        order = sorted(range(len(chances)), key=lambda e: -chances[e].item())
        taken: list[int] = []
        while sum(chances[e].item() for e in taken) < p and len(taken) < most:
            taken.append(order[len(taken)])
        total = sum(chances[e] for e in taken) if normalize else 1.0
        ids.append(taken)
        weights.append([chances[e] / total for e in taken])
        probabilities.append(chances)
    return ids, weights, probabilities


def slow_entropy(probabilities: list[list[Any]]) -> Any:
    return sum(-sum(p * torch.log(p) for p in chances) for chances in probabilities) / len(probabilities)


@pytest.mark.parametrize(
    ("threshold", "most", "normalize"),
    [
        (0.4, E, False),
        (0.4, E, True),
        (0.9, E, False),
        (0.9, 3, False),
        (0.9, 3, True),
        (0.01, 2, False),
        (0.4, 1, False),
    ],
)
def test_is_the_papers_with_its_loss_and_gradients(threshold: float, most: int, normalize: bool) -> None:
    router = router_of(top_k=most, threshold=threshold, normalize=normalize)
    x = torch.randn(40, D, requires_grad=True)
    routing = router(x)
    mark = torch.cat([torch.randn(E), torch.full((1,), 1e9)])  # what each expert says; a null one must not be heard
    loss = entropy_of(routing)
    ((mark[routing.expert_ids] * routing.weights).sum() + loss).backward()

    wide, gate = (each.detach().double().requires_grad_() for each in (x, router.weight))
    ids, weights, probabilities = slow(wide, gate, threshold, most, normalize)
    assert routing.top_k == most
    total = check_choice(routing, ids, weights, mark)
    wanted = slow_entropy(probabilities)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    (total + wanted).backward()
    check_gradients([(x, wide), (router.weight, gate)])


def test_tokens_take_different_numbers_of_experts() -> None:
    taken = (router_of(threshold=0.6)(torch.randn(100, D)).expert_ids < E).sum(dim=1)
    assert taken.min() >= 1
    assert len(taken.unique()) > 2
    assert router_of(threshold=0.6).is_adaptive


def test_even_chances_take_the_share_of_the_threshold() -> None:
    """The paper's warning: p = 0.5 of a router that knows nothing takes half of the experts."""
    router, x = router_of(threshold=0.5), torch.randn(1, D).expand(7, D)
    with torch.no_grad():
        router.weight.zero_()
    routing = router(x)
    assert ((routing.expert_ids < E).sum(dim=1) == E // 2).all()
    assert entropy_of(routing).item() == pytest.approx(math.log(E))


def test_a_threshold_of_one_takes_all_experts_and_one_expert_is_always_taken() -> None:
    x = torch.randn(9, D)
    assert (router_of(threshold=1.0)(x * 0.1).expert_ids < E).all()
    assert (router_of(1, 1)(x).expert_ids == 0).all()
    assert entropy_of(router_of(1, 1)(x)) == 0


def test_a_certain_router_takes_one_expert_and_keeps_a_finite_gradient() -> None:
    router, x = router_of(threshold=0.99), torch.ones(4, D, requires_grad=True)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[3] = 100.0  # the others' probabilities underflow
    routing = router(x)
    assert routing.expert_ids.tolist() == [[3] + [E] * (E - 1)] * 4
    (entropy_of(routing) + routing.weights.sum()).backward()
    assert entropy_of(routing) == 0
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert router.weight.grad is not None and torch.isfinite(router.weight.grad).all()


def test_no_tokens() -> None:
    router, x = router_of(), torch.randn(0, D, requires_grad=True)
    routing = router(x)
    assert routing.expert_ids.shape == (0, E)
    (entropy_of(routing) + routing.weights.sum()).backward()
    assert entropy_of(routing) == 0


def test_padding_does_not_count_in_the_entropy() -> None:
    router, x = router_of(), torch.randn(20, D)
    whole = router(x).without(torch.arange(20).unsqueeze(1) >= 12)
    torch.testing.assert_close(entropy_of(whole), entropy_of(router(x[:12])))


def test_features_of_half_precision_and_autocast_change_nothing() -> None:
    check_half_precision(router_of())


def test_top_k_of_one_call_is_the_most() -> None:
    router, x = router_of(threshold=0.9), torch.randn(20, D)
    assert torch.equal(router(x, 2).expert_ids, router(x).expert_ids[:, :2])


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.1])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ConfigError, match="it must be above 0 and at most 1"):
        create_router("top_p", D, E, 2, threshold=threshold)


def test_entropy_of_scores_that_do_not_sum_to_one() -> None:
    routing = create_router("sigmoid_topk", D, E, 2)(torch.randn(30, D))
    share = routing.scores.double() / routing.scores.double().sum(dim=1, keepdim=True)
    torch.testing.assert_close(entropy_of(routing).double(), -(share * share.log()).sum(dim=1).mean())
