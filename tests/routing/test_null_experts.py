"""AdaMoE's router and loss against the paper's formulas, one token after the other, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.routing import Routing, create_router
from moesaic.routing.null_experts import NullExperts, NullLoadBalancing

TRUE, NULL, D, K = 5, 3, 8, 4


def router_of(num_ffn: int | None = TRUE, columns: int = TRUE + NULL, top_k: int = K) -> NullExperts:
    torch.manual_seed(0)
    router = create_router("null_experts", D, columns, top_k)
    assert isinstance(router, NullExperts)
    router.reset_parameters(1.0)
    router.num_ffn = num_ffn
    return router


def loss_of(routing: Routing, counts: Tensor | None = None) -> Tensor:
    balancer: Any = NullLoadBalancing()
    loss: Tensor = balancer.loss(routing, routing.counts() if counts is None else counts)
    return loss


def slow(x: Tensor, gate: Tensor, top_k: int, true: int) -> tuple[list[list[int]], list[list[Any]], list[list[Tensor]]]:
    """Ids, weights and probabilities, from section 3: top-k of a softmax over all, weights over the true ones."""
    ids, weights, probabilities = [], [], []
    for token in x:
        exponentials = [torch.exp((token * row).sum()) for row in gate]
        p = [each / sum(exponentials) for each in exponentials]
        taken = sorted(range(len(p)), key=lambda e: -p[e].item())[:top_k]
        total = sum(p[e] for e in taken if e < true)
        ids.append(taken)
        weights.append([p[e] / total if e < true else 0.0 for e in taken])
        probabilities.append(p)
    return ids, weights, probabilities


def slow_loss(ids: list[list[int]], probabilities: list[list[Tensor]], true: int, columns: int) -> Any:
    """(n + m) · Σ f̃ · P; f̃ of a null expert is the mean of theirs."""
    load = [sum(row.count(e) for row in ids) / sum(map(len, ids)) for e in range(columns)]
    mean = sum(load[true:]) / (columns - true)
    total: Any = 0.0
    for e in range(columns):
        importance = sum(p[e] for p in probabilities) / len(probabilities)
        total = total + columns * (load[e] if e < true else mean) * importance
    return total


def test_is_the_papers_with_its_gradients() -> None:
    router, x = router_of(), torch.randn(40, D)
    x.requires_grad_()
    routing = router(x)
    mark = torch.randn(TRUE + NULL)  # what each expert says
    (mark[routing.expert_ids] * routing.weights).sum().add(loss_of(routing)).backward()

    wide, gate = (each.detach().double().requires_grad_() for each in (x, router.weight))
    ids, weights, probabilities = slow(wide, gate, K, TRUE)
    assert routing.expert_ids.tolist() == ids
    told = torch.tensor([[float(torch.as_tensor(w).detach()) for w in row] for row in weights])
    torch.testing.assert_close(routing.weights, told)
    total = sum(
        mark[e].double() * w for row, own in zip(ids, weights, strict=True) for e, w in zip(row, own, strict=True)
    )
    loss = slow_loss(ids, probabilities, TRUE, TRUE + NULL)
    torch.testing.assert_close(loss_of(routing).double(), loss, rtol=1e-5, atol=1e-6)
    (total + loss).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(router.weight.grad.double(), gate.grad, rtol=1e-4, atol=1e-4)


def test_tokens_take_different_numbers_of_true_experts() -> None:
    routing = router_of()(torch.randn(100, D))
    true = (routing.expert_ids < TRUE).sum(dim=1)
    assert true.min() < true.max() <= K
    assert (routing.weights[routing.expert_ids >= TRUE] == 0).all()
    torch.testing.assert_close(routing.weights.sum(dim=1), (true > 0).float())


def test_a_token_of_null_experts_only_weighs_nothing() -> None:
    router = router_of(top_k=NULL)
    with torch.no_grad():
        router.weight[:] = 0
        router.weight[TRUE:] = 1
    x = torch.ones(4, D, requires_grad=True)
    routing = router(x)
    assert (routing.expert_ids >= TRUE).all()
    assert (routing.weights == 0).all()
    routing.weights.sum().add(loss_of(routing)).backward()
    assert x.grad is not None and router.weight.grad is not None
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_true_experts_too_unlikely_for_a_float_give_no_nan() -> None:
    router = router_of(top_k=TRUE + NULL)
    with torch.no_grad():
        router.weight[:] = -100
        router.weight[TRUE:] = 100
    x = torch.ones(2, D, requires_grad=True)
    routing = router(x)
    assert (routing.weights == 0).all()
    routing.weights.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(("columns", "true", "top_k"), [(2, 1, 1), (2, 1, 2), (8, 5, 8), (4, 4, 2), (1, 1, 1)])
def test_few_and_all(columns: int, true: int, top_k: int) -> None:
    router, x = router_of(true, columns, top_k), torch.randn(20, D)
    routing = router(x)
    ids, weights, _ = slow(x.double(), router.weight.detach().double(), top_k, true)
    assert routing.expert_ids.tolist() == ids
    torch.testing.assert_close(routing.weights, torch.tensor(weights).float())
    assert loss_of(routing).isfinite()


def test_no_tokens() -> None:
    routing = router_of()(torch.empty(0, D))
    assert routing.weights.shape == (0, K)
    assert loss_of(routing).item() == 0.0


def test_all_tokens_alike() -> None:
    routing = router_of()(torch.randn(1, D).expand(9, D))
    assert (routing.expert_ids == routing.expert_ids[0]).all()
    ids = routing.expert_ids.tolist()
    probabilities = [list(row.double()) for row in routing.scores]
    wanted = slow_loss(ids, probabilities, TRUE, TRUE + NULL)
    torch.testing.assert_close(loss_of(routing).double(), wanted.double(), rtol=1e-5, atol=1e-6)


def test_without_null_experts_it_is_softmax_topk() -> None:
    router, x = router_of(num_ffn=None), torch.randn(10, D)
    plain = create_router("softmax_topk", D, TRUE + NULL, K)
    plain.load_state_dict(router.state_dict())
    assert torch.equal(router(x).expert_ids, plain(x).expert_ids)
    torch.testing.assert_close(router(x).weights, plain(x).weights)


def test_half_precision_features() -> None:
    router = router_of().bfloat16()
    routing = router(torch.randn(30, D).bfloat16())
    assert routing.weights.dtype == routing.scores.dtype == torch.float32


class TestLoss:
    def routing(self, ids: list[list[int]], scores: Tensor | None = None) -> Routing:
        number = TRUE + NULL
        scores = torch.full((len(ids), number), 1 / number) if scores is None else scores
        return Routing(torch.tensor(ids), torch.ones(len(ids), len(ids[0])), scores, num_ffn=TRUE)

    def test_is_one_where_the_load_is_even(self) -> None:
        assert loss_of(self.routing([[0, 1, 2, 3], [4, 5, 6, 7]])).item() == pytest.approx(1.0)

    def test_does_not_mind_which_null_expert_is_taken(self) -> None:
        """A loss over each column would be greater where all takes of null experts are of one of them."""
        scores = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1]).expand(2, 8)
        spread = loss_of(self.routing([[0, 1, 5, 6], [2, 3, 4, 7]], scores))
        one = loss_of(self.routing([[0, 1, 5, 5], [2, 3, 4, 5]], scores))
        assert one.item() == pytest.approx(spread.item())

    def test_pushes_tokens_away_from_crowded_null_experts(self) -> None:
        logits = torch.zeros(6, TRUE + NULL, requires_grad=True)
        routing = self.routing([[5, 6]] * 6, logits.softmax(-1))
        loss_of(routing).backward()
        assert logits.grad is not None
        assert (logits.grad[:, TRUE:] > 0).all() and (logits.grad[:, :TRUE] < 0).all()

    def test_counts_of_all_ranks(self) -> None:
        routing = self.routing([[0, 5]])
        counts = torch.tensor([3, 1, 0, 0, 0, 4, 0, 0])
        scores = [list(routing.scores[0].double())]
        ids = [[e for e, n in enumerate(counts.tolist()) for _ in range(n)]]
        assert loss_of(routing, counts).item() == pytest.approx(float(slow_loss(ids, scores, TRUE, TRUE + NULL)))

    def test_padding_does_not_count(self) -> None:
        routing = self.routing([[0, 1], [2, 5]])
        hidden = routing.without(torch.tensor([[False], [True]]))
        hidden.scores = hidden.scores.clone()
        hidden.scores[1] = 0.9
        assert loss_of(hidden).item() == pytest.approx(float(slow_loss([[0, 1]], [list(hidden.scores[0])], TRUE, 8)))
