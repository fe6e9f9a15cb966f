"""MoE++'s router and loss against the paper's formulas, one token after the other, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing import Routing, RoutingContext, create_router
from moesaic.routing.gating_residual import GatingResidual, HeterogeneousLoadBalancing

D, FFN, COLUMNS, K = 8, 4, 7, 2


def router_of(columns: int = COLUMNS, top_k: int = K, seed: int = 0, **options: Any) -> GatingResidual:
    torch.manual_seed(seed)
    router = create_router("gating_residual", D, columns, top_k, **options)
    assert isinstance(router, GatingResidual)
    router.reset_parameters(0.7)
    return router


def loss_of(routing: Routing, tau: float = 0.75, counts: Tensor | None = None) -> Tensor:
    return HeterogeneousLoadBalancing(tau=tau).loss(routing, routing.counts() if counts is None else counts)


def slow(token: Tensor, gate: Tensor, residual: Tensor, before: list[Tensor] | None) -> list[Tensor]:
    """Equation 6: the scores of one token in one layer, from those of the layer before."""
    logits = [(token * row).sum() for row in gate]
    if before is not None:
        logits = [
            own + sum(w * g for w, g in zip(row, before, strict=True))
            for own, row in zip(logits, residual, strict=True)
        ]
    return logits


def softmax(logits: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(z) for z in logits]
    return [each / sum(exponentials) for each in exponentials]


def slow_loss(ids: list[list[int]], probabilities: list[list[Tensor]], tau: float) -> Any:
    """Equation 7, times E / K: our f is a share of the slots, and E goes before the sum."""
    total: Any = 0.0
    for e in range(len(probabilities[0])):
        f = sum(row.count(e) for row in ids) / len(ids)
        p = sum(each[e] for each in probabilities) / len(probabilities)
        total = total + (1.0 if e < FFN else tau) * f * p
    return total * len(probabilities[0]) / len(ids[0])


@pytest.mark.parametrize("normalize", [True, False])
def test_three_layers_are_the_papers_with_their_gradients(normalize: bool) -> None:
    routers = [router_of(seed=seed, normalize=normalize) for seed in range(3)]
    xs = [torch.randn(20, D, requires_grad=True) for _ in routers]
    mark = torch.randn(COLUMNS)
    context, total = RoutingContext(), torch.zeros(())
    ids = []
    for router, x in zip(routers, xs, strict=True):
        routing = router(x, None, context)
        routing.num_ffn = FFN
        context = RoutingContext(carried=routing.carry)
        ids.append(routing.expert_ids.tolist())
        total = total + (mark[routing.expert_ids] * routing.weights).sum() + loss_of(routing)
    total.backward()

    wides = [x.detach().double().requires_grad_() for x in xs]
    gates = [router.weight.detach().double().requires_grad_() for router in routers]
    residuals = [router.residual.detach().double().requires_grad_() for router in routers]
    wanted: Any = 0.0
    before: list[list[Tensor] | None] = [None] * 20
    for x, gate, residual, taken in zip(wides, gates, residuals, ids, strict=True):
        told = [slow(token, gate, residual, own) for token, own in zip(x, before, strict=True)]
        before = list(told)
        probabilities = [softmax(each) for each in told]
        for p, row in zip(probabilities, taken, strict=True):
            assert row == sorted(range(COLUMNS), key=lambda e: -p[e].item())[:K]
            share = sum(p[e] for e in row) if normalize else 1.0
            wanted = wanted + sum(mark[e].double() * p[e] / share for e in row)
        wanted = wanted + slow_loss(taken, probabilities, 0.75)
    wanted.backward()

    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    for x, wide in zip(xs, wides, strict=True):
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    for router, gate in zip(routers, gates, strict=True):
        torch.testing.assert_close(router.weight.grad.double(), gate.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    assert routers[0].residual.grad is not None
    assert not routers[0].residual.grad.any()  # nothing comes before the first
    for router, residual in zip(routers[1:], residuals[1:], strict=True):
        torch.testing.assert_close(router.residual.grad.double(), residual.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_the_layer_before_changes_who_is_chosen() -> None:
    router, x = router_of(), torch.randn(50, D)
    other = RoutingContext(carried=4 * torch.randn(50, COLUMNS))
    assert not torch.equal(router(x).expert_ids, router(x, None, other).expert_ids)
    assert torch.equal(router(x).expert_ids, router(x, None, RoutingContext()).expert_ids)


@pytest.mark.parametrize("shape", [(4, COLUMNS + 1), (3, COLUMNS)])
def test_what_the_layer_before_left_must_fit(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="takes the logits of 4 tokens for 7 experts"):
        router_of()(torch.randn(4, D), None, RoutingContext(carried=torch.zeros(shape)))


@pytest.mark.parametrize(("columns", "top_k"), [(1, 1), (3, 3), (7, 7)])
def test_few_and_all(columns: int, top_k: int) -> None:
    routing = router_of(columns, top_k)(torch.randn(6, D), None, RoutingContext(carried=torch.randn(6, columns)))
    assert (routing.expert_ids.sort(dim=1).values == torch.arange(columns)).all()
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(6))


def test_no_tokens_and_all_alike() -> None:
    empty = router_of()(torch.empty(0, D), None, RoutingContext(carried=torch.empty(0, COLUMNS)))
    assert empty.weights.shape == (0, K) and empty.carry is not None and empty.carry.shape == (0, COLUMNS)
    assert loss_of(empty).item() == 0.0
    alike = router_of()(torch.randn(1, D).expand(5, D), None, RoutingContext(carried=torch.ones(5, COLUMNS)))
    assert (alike.expert_ids == alike.expert_ids[0]).all()


def test_half_precision_and_autocast() -> None:
    router = router_of().bfloat16()
    x, carried = torch.randn(30, D).bfloat16(), torch.randn(30, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, None, RoutingContext(carried=carried))
    wide = router.float()(x.float(), None, RoutingContext(carried=carried))
    assert routing.carry is not None and routing.carry.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.carry, wide.carry)


class TestLoss:
    def routing(self, ids: list[list[int]], logits: Tensor | None = None) -> Routing:
        scores = torch.full((len(ids), COLUMNS), 1 / COLUMNS) if logits is None else logits.softmax(-1)
        return Routing(torch.tensor(ids), torch.ones(len(ids), len(ids[0])), scores, num_ffn=FFN)

    def test_tau_one_is_load_balancing(self) -> None:
        from moesaic.routing import balance_loss

        routing = self.routing([[0, 5], [1, 6], [0, 4]], torch.randn(3, COLUMNS))
        assert loss_of(routing, tau=1.0).item() == pytest.approx(balance_loss(routing, {"load_balancing": 1.0}).item())

    def test_a_small_tau_punishes_zero_computation_experts_less(self) -> None:
        cheap, dear = self.routing([[4, 5], [5, 6]]), self.routing([[0, 1], [1, 2]])
        assert loss_of(cheap, tau=0.5).item() == pytest.approx(0.5)
        assert loss_of(dear, tau=0.5).item() == pytest.approx(1.0)

    def test_without_zero_computation_experts(self) -> None:
        routing = self.routing([[0, 1], [2, 3]])
        routing.num_ffn = None
        assert loss_of(routing, tau=0.1).item() == pytest.approx(1.0)

    def test_counts_of_all_ranks(self) -> None:
        routing = self.routing([[0, 5]])
        counts = torch.tensor([4, 0, 0, 0, 0, 4, 0])
        assert loss_of(routing, 0.5, counts).item() == pytest.approx(0.75)

    def test_padding_does_not_count(self) -> None:
        routing = self.routing([[0, 1], [2, 5]], torch.randn(2, COLUMNS)).without(torch.tensor([[False], [True]]))
        wanted = slow_loss([[0, 1]], [list(routing.scores[0])], 0.75)
        assert loss_of(routing).item() == pytest.approx(float(wanted))

    @pytest.mark.parametrize("tau", [0.0, -1.0])
    def test_tau_must_be_above_zero(self, tau: float) -> None:
        with pytest.raises(ConfigError, match=f"tau is {tau}: it must be above 0"):
            HeterogeneousLoadBalancing(tau=tau)

    def test_a_token_whose_scores_are_all_zero(self) -> None:
        scores = torch.tensor([[0.0, 0.0], [3.0, 1.0]], requires_grad=True)
        routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1), scores)
        loss = loss_of(routing, 1.0)
        loss.backward()
        assert loss.item() == pytest.approx(2 * (0.5 * 0.75 / 2 + 0.5 * 0.25 / 2))
        assert scores.grad is not None and scores.grad[1].isfinite().all()
