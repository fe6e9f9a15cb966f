"""Noisy top-k gating against equations 3 to 11 of its paper, one token after the other, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import BALANCERS, Routing, create_router
from moesaic.routing.noisy_topk import NoisyTopK

D = 12


def router_of(num_experts: int = 6, top_k: int = 2, std: float = 0.5) -> NoisyTopK:
    torch.manual_seed(0)
    router = create_router("noisy_topk", D, num_experts, top_k)
    assert isinstance(router, NoisyTopK)
    for weight in router.parameters():
        torch.nn.init.normal_(weight, std=std)
    return router


def loss_of(name: str, routing: Routing) -> Tensor:
    balancer: Any = BALANCERS.get(name)
    loss: Tensor = balancer().loss(routing, routing.counts())
    return loss


def slow(x: Tensor, gate: Tensor, noise_gate: Tensor, noise: Tensor | None, k: int) -> dict[str, Any]:
    """Equations 3 to 5 and 8 to 10; ``noise`` [T, E] standard normal, None for evaluation."""
    ids, weights, load = [], [], [x.new_zeros(()) for _ in gate]
    for t, token in enumerate(x):
        clean = [(token * row).sum() for row in gate]
        std = [torch.log(1 + torch.exp((token * row).sum())) for row in noise_gate]
        h = clean if noise is None else [c + noise[t, e] * s for e, (c, s) in enumerate(zip(clean, std, strict=True))]
        taken = sorted(range(len(h)), key=lambda e: -h[e].item())[:k]
        exponentials = [torch.exp(h[e]) for e in taken]
        ids.append(taken)
        weights.append([value / sum(exponentials) for value in exponentials])
        for e in range(len(h)):
            others = sorted((h[o] for o in range(len(h)) if o != e), key=lambda v: -v.item())
            if len(others) >= k:  # else the expert is taken for certain
                load[e] = load[e] + 0.5 * (1 + torch.erf((clean[e] - others[k - 1]) / std[e] / math.sqrt(2)))
    return {"ids": ids, "weights": weights, "load": load}


def slow_importance(ids: list[list[int]], weights: list[list[Any]], num_experts: int) -> list[Any]:
    sums: list[Any] = [0.0] * num_experts
    for row, own in zip(ids, weights, strict=True):
        for e, w in zip(row, own, strict=True):
            sums[e] = sums[e] + w
    return sums


def slow_cv2(values: list[Any]) -> Any:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_is_the_papers_with_its_losses_and_gradients(top_k: int) -> None:
    router, x = router_of(top_k=top_k), torch.randn(30, D, requires_grad=True)
    torch.manual_seed(7)
    routing = router(x)
    torch.manual_seed(7)
    noise = torch.randn(30, 6).double()
    mark = torch.randn(6)  # what each expert says
    losses = {name: loss_of(name, routing) for name in ("importance", "load")}
    ((mark[routing.expert_ids] * routing.weights).sum() + sum(losses.values())).backward()

    wide, gate, noise_gate = (
        each.detach().double().requires_grad_() for each in (x, router.weight, router.noise_weight)
    )
    told = slow(wide, gate, noise_gate, noise, top_k)
    assert routing.expert_ids.tolist() == told["ids"]
    total: Any = 0.0
    for row, own, got in zip(told["ids"], told["weights"], routing.weights, strict=True):
        torch.testing.assert_close(got.double(), torch.stack(own), rtol=1e-4, atol=1e-6)
        total = total + sum(mark[e].double() * w for e, w in zip(row, own, strict=True))
    wanted = {
        "importance": slow_cv2(slow_importance(told["ids"], told["weights"], 6)),
        "load": slow_cv2(told["load"]),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss.double(), wanted[name], rtol=1e-4, atol=1e-6)
    (total + sum(wanted.values())).backward()
    for got, want in ((x, wide), (router.weight, gate), (router.noise_weight, noise_gate)):
        assert got.grad is not None and want.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4)


def test_evaluation_has_no_noise() -> None:
    router, x = router_of().eval(), torch.randn(30, D)
    routing = router(x)
    told = slow(x.double(), router.weight.double(), router.noise_weight.double(), None, 2)
    assert routing.expert_ids.tolist() == told["ids"]
    assert torch.equal(routing.weights, router(x).weights)
    assert torch.equal(routing.logits, router.logits(x))
    assert loss_of("load", routing) is None
    assert loss_of("importance", routing) > 0


def test_training_draws_other_noise_each_time_and_the_same_from_the_same_seed() -> None:
    router, x = router_of(), torch.randn(30, D)
    first, second = router(x), router(x)
    assert not torch.equal(first.expert_ids, second.expert_ids)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(router(x))
    assert torch.equal(runs[0].weights, runs[1].weights)
    assert torch.equal(runs[0].expert_ids, runs[1].expert_ids)


def test_begins_with_nothing_but_noise_and_an_even_load() -> None:
    router = create_router("noisy_topk", D, 4, 1)
    assert all((weight == 0).all() for weight in router.parameters())
    assert len(list(router.parameters())) == 2
    torch.manual_seed(0)
    routing = router(torch.randn(4000, D))
    assert (routing.counts() - 1000).abs().max() < 150
    assert loss_of("load", routing) < 1e-2


def test_one_expert_and_all_experts() -> None:
    x = torch.randn(5, D)
    for experts, top_k in ((1, 1), (4, 4)):
        routing = router_of(experts, top_k)(x)
        assert routing.expert_ids.sort().values.tolist() == [list(range(experts))] * 5
        torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(5))
        assert loss_of("load", routing) is None
    assert loss_of("importance", router_of(1, 1)(x)) == 0


def test_no_tokens() -> None:
    router, x = router_of(), torch.randn(0, D, requires_grad=True)
    routing = router(x)
    assert routing.expert_ids.shape == routing.weights.shape == (0, 2)
    loss = loss_of("importance", routing) + loss_of("load", routing)
    (loss + routing.weights.sum()).backward()
    assert loss == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in router.parameters())


def test_tokens_that_are_all_alike_take_different_experts_while_training() -> None:
    router, x = router_of(std=0.1), torch.randn(1, D).expand(50, D)
    assert len(set(router(x).expert_ids[:, 0].tolist())) > 1
    assert len(set(router.eval()(x).expert_ids[:, 0].tolist())) == 1


def test_padding_counts_in_neither_loss() -> None:
    router, x = router_of(), torch.randn(20, D)
    padding = torch.arange(20).unsqueeze(1) >= 12
    torch.manual_seed(1)
    whole = router(x)
    part = whole.without(padding)
    torch.manual_seed(1)
    noise = torch.randn(20, 6).double()
    told = slow(x[:12].double(), router.weight.double(), router.noise_weight.double(), noise[:12], 2)
    torch.testing.assert_close(loss_of("load", part).double(), slow_cv2(told["load"]), rtol=1e-4, atol=1e-6)
    sums = slow_importance(told["ids"], told["weights"], 6)
    torch.testing.assert_close(loss_of("importance", part).double(), slow_cv2(sums), rtol=1e-4, atol=1e-6)


def test_underflowed_noise_makes_no_nan() -> None:
    router, x = router_of(), torch.ones(3, D, requires_grad=True)
    with torch.no_grad():
        router.noise_weight.fill_(-100.0)
        router.weight.zero_()  # exact ties
    loss_of("load", router(x)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (x, *router.parameters()))


def test_detach_leaves_no_graph() -> None:
    cut = router_of()(torch.randn(4, D)).detach()
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in vars(cut).values())


def test_features_of_half_precision_and_autocast_change_nothing() -> None:
    router, x = router_of(), torch.randn(40, D).bfloat16()
    runs = []
    for wide in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
            runs.append(router(x.float() if wide else x))
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert runs[0].weights.dtype == torch.float32


def test_load_needs_this_router() -> None:
    from moesaic import MoEConfig

    with pytest.raises(
        ConfigError, match="the balancer 'load' needs the router 'noisy_topk'; SoftmaxTopK adds no noise"
    ):
        MoEConfig(8, 8, 4, balancing={"load": 0.1})
    MoEConfig(8, 8, 4, balancing={"importance": 0.1})
