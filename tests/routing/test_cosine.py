"""Cosine routing against equations 6 to 8 of its paper, one token after the other, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.routing.comparing import check_choice, check_gradients, check_half_precision, loss_of
from torch import Tensor

from moesaic import MoEConfig
from moesaic.errors import ConfigError
from moesaic.routing import create_router
from moesaic.routing.cosine import Cosine

D = 12
FIXED = {"softmax": 0.3, "sigmoid": 0.07}


def router_of(num_experts: int = 6, top_k: int = 2, **options: Any) -> Cosine:
    torch.manual_seed(0)
    router = create_router("cosine", D, num_experts, top_k, **options)
    assert isinstance(router, Cosine)
    router.reset_parameters(0.5)
    return router


cosine_loss = partial(loss_of, "cosine_load_balancing")


def slow(x: Tensor, parameters: list[Tensor], k: int, gate: str, normalize: bool) -> tuple[list[Any], ...]:
    """Ids, weights, and the cosines of all experts."""
    embeddings, projection, log_temperature = parameters
    ids, weights, cosines = [], [], []
    for token in x:
        h = torch.stack([(row * token).sum() for row in projection])
        s = [(h * e).sum() / (h.square().sum().sqrt() * e.square().sum().sqrt()) for e in embeddings]
        tau = torch.exp(log_temperature[0])
        if gate == "softmax":
            g = [torch.exp(v / tau) / sum(torch.exp(u / tau) for u in s) for v in s]
        else:
            g = [1 / (1 + torch.exp(-v / tau)) for v in s]
        taken = sorted(range(len(s)), key=lambda e: -s[e].item())[:k]
        total = sum(g[e] for e in taken) if normalize else 1.0
        ids.append(taken)
        weights.append([g[e] / total for e in taken])
        cosines.append(s)
    return ids, weights, cosines


def slow_loss(ids: list[list[int]], cosines: list[list[Any]], tau: float) -> Any:
    """Equation 8; the frequencies are shares of the slots, since the paper takes one a token."""
    experts, total = len(cosines[0]), torch.zeros((), dtype=torch.float64)
    slots = sum(map(len, ids))
    for s in cosines:
        for e in range(experts):
            t = sum(row.count(e) for row in ids) / slots
            total = total + t * torch.exp(s[e] / tau) / sum(torch.exp(u / tau) for u in s)
    return total * experts / len(cosines)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (3, False), (3, True), (6, True)])
def test_is_the_papers_with_its_loss_and_gradients(gate: str, top_k: int, normalize: bool) -> None:
    router = router_of(top_k=top_k, gate=gate, normalize=normalize)
    x = torch.randn(25, D, requires_grad=True)
    routing = router(x)
    mark = torch.randn(6)  # what each expert says
    ((mark[routing.expert_ids] * routing.weights).sum() + cosine_loss(routing)).backward()

    parameters = [router.weight, router.projection, router.log_temperature]
    wide, *wide_parameters = (each.detach().double().requires_grad_() for each in (x, *parameters))
    ids, weights, cosines = slow(wide, wide_parameters, top_k, gate, normalize)
    total = check_choice(routing, ids, weights, mark)
    wanted = slow_loss(ids, cosines, FIXED[gate])
    torch.testing.assert_close(cosine_loss(routing).double(), wanted, rtol=1e-4, atol=1e-6)
    (total + wanted).backward()
    check_gradients(zip((x, *parameters), (wide, *wide_parameters), strict=True))


def test_lengths_do_not_matter() -> None:
    router, x = router_of(), torch.randn(20, D)
    before = router(x)
    with torch.no_grad():
        router.weight.mul_(torch.tensor([0.1, 7.0, 1.0, 3.0, 0.5, 100.0]).unsqueeze(1))
    after = router(x * 13)
    assert torch.equal(before.expert_ids, after.expert_ids)
    torch.testing.assert_close(before.weights, after.weights)
    assert (router.cosines(x).abs() <= 1 + 1e-6).all()


def test_logits_are_those_of_the_routing_and_can_be_shifted() -> None:
    router, x = router_of(), torch.randn(20, D)
    assert torch.equal(router(x).logits, router.logits(x))
    router.logit_shift = torch.tensor([0.0, 0, 0, 0, 100, 0])
    assert torch.equal(router(x).logits, router.logits(x))
    assert (router(x).expert_ids[:, 0] == 4).all()


def test_the_loss_is_blind_to_the_learned_temperature_while_training() -> None:
    router, x = router_of(), torch.randn(20, D)
    before, plain = cosine_loss(router(x)), cosine_loss(router.eval()(x))
    with torch.no_grad():
        router.log_temperature.add_(1.0)
    assert torch.equal(cosine_loss(router.train()(x)), before)
    assert not torch.equal(cosine_loss(router.eval()(x)), plain)
    cosine_loss(router.train()(x)).backward()
    assert router.log_temperature.grad is None


@pytest.mark.parametrize(("num_experts", "width"), [(1, 2), (3, 2), (16, 8), (32, 16)])
def test_the_small_space_is_half_the_number_of_experts(num_experts: int, width: int) -> None:
    router = router_of(num_experts, 1)
    shapes = {name: list(p.shape) for name, p in router.named_parameters()}
    assert shapes == {"weight": [num_experts, width], "projection": [width, D], "log_temperature": [1]}
    assert list(router_of(num_experts, 1, width=5).weight.shape) == [num_experts, 5]


def test_the_temperature_begins_as_in_the_paper() -> None:
    for gate, temperature in FIXED.items():
        assert router_of(gate=gate).log_temperature.exp().item() == pytest.approx(temperature)


def test_saturated_sigmoids_still_take_the_nearest() -> None:
    router = router_of(gate="sigmoid", top_k=1)
    with torch.no_grad():
        router.log_temperature.fill_(-10.0)
    x = torch.randn(50, D)
    assert torch.equal(router(x).expert_ids[:, 0], router.cosines(x).argmax(dim=-1))


def test_empty_rows_no_tokens_and_one_expert() -> None:
    for experts, top_k in ((1, 1), (6, 6)):
        router = router_of(experts, top_k)
        for tokens in (0, 4):
            x = torch.zeros(tokens, D, requires_grad=True)
            routing = router(x)
            assert routing.expert_ids.shape == (tokens, top_k)
            (routing.weights.sum() + cosine_loss(routing)).backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (x, *router.parameters()))


def test_tokens_that_are_all_alike_go_the_same_way() -> None:
    ids = router_of()(torch.randn(1, D).expand(9, D)).expert_ids
    assert (ids == ids[0]).all()


def test_features_of_half_precision_and_autocast_change_nothing() -> None:
    check_half_precision(router_of())


def test_detach_leaves_no_graph() -> None:
    cut = router_of()(torch.randn(4, D)).detach()
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in vars(cut).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": -1}, "width is -1: it must be at least 1, or 0 for half the number of experts"),
        ({"gate": "relu"}, "gate is 'relu': it must be one of softmax, sigmoid"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_router("cosine", D, 6, 2, **options)


def test_its_loss_needs_it() -> None:
    with pytest.raises(ConfigError, match="'cosine_load_balancing' needs the router 'cosine'; SoftmaxTopK has no cos"):
        MoEConfig(8, 8, 4, balancing={"cosine_load_balancing": 0.1})
    MoEConfig(8, 8, 4, router="cosine", balancing={"cosine_load_balancing": 0.1})
