"""Hash routing: fixed experts for each token id, spread evenly, and the paper's greedy assignment by frequency."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError
from moesaic.routing import Router, Routing, RoutingContext, create_router
from moesaic.routing.hash import Hash

D, E, V = 8, 6, 600


def router_of(num_experts: int = E, top_k: int = 2, seed: int = 0, **options: Any) -> Hash:
    torch.manual_seed(seed)
    router = create_router("hash", D, num_experts, top_k, **options)
    assert isinstance(router, Hash)
    return router


def route(router: Router, ids: Tensor, top_k: int | None = None) -> Routing:
    routing: Routing = router(torch.randn(ids.numel(), D), top_k, RoutingContext(token_ids=ids))
    return routing


@pytest.mark.parametrize("options", [{}, {"vocab_size": V}], ids=str)
class TestEitherHash:
    def test_the_id_decides_and_nothing_else(self, options: dict[str, int]) -> None:
        router = router_of(**options)
        ids = torch.randint(V, (300,))
        routing, again = route(router, ids), route(router.eval(), ids)
        assert torch.equal(routing.expert_ids, again.expert_ids)
        experts_of_id: dict[int, list[int]] = {}
        for token, experts in zip(ids.tolist(), routing.expert_ids.tolist(), strict=True):
            assert experts_of_id.setdefault(token, experts) == experts
        assert len({tuple(experts) for experts in experts_of_id.values()}) > E

    @pytest.mark.parametrize("top_k", [1, 2, 5, 6])
    def test_different_experts_with_equal_weights(self, options: dict[str, int], top_k: int) -> None:
        routing = route(router_of(top_k=top_k, **options), torch.arange(V))
        assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist())
        assert ((routing.expert_ids >= 0) & (routing.expert_ids < E)).all()
        assert (routing.weights == 1 / top_k).all()
        assert routing.weights.dtype == routing.scores.dtype == torch.float32
        for row, experts in zip(routing.scores.tolist(), routing.expert_ids.tolist(), strict=True):
            assert {e for e, score in enumerate(row) if score} == set(experts)
        torch.testing.assert_close(routing.scores.sum(dim=1), torch.ones(V))
        assert routing.logits is None

    def test_no_parameters_no_gradient(self, options: dict[str, int]) -> None:
        router = router_of(**options)
        assert list(router.parameters()) == []
        assert not route(router, torch.arange(5)).weights.requires_grad

    def test_is_saved_and_drawn_anew_for_each_router(self, options: dict[str, int]) -> None:
        first, second = router_of(**options), router_of(seed=1, **options)
        before = route(first, torch.arange(V)).expert_ids
        assert not torch.equal(route(second, torch.arange(V)).expert_ids, before)
        second.load_state_dict(first.state_dict())
        assert torch.equal(route(second, torch.arange(V)).expert_ids, before)
        assert torch.equal(route(router_of(**options), torch.arange(V)).expert_ids, before)
        assert torch.equal(route(first.bfloat16(), torch.arange(V)).expert_ids, before)

    def test_top_k_of_one_call_keeps_the_first_experts(self, options: dict[str, int]) -> None:
        router, ids = router_of(top_k=4, **options), torch.arange(V)
        assert torch.equal(route(router, ids, 2).expert_ids, route(router, ids).expert_ids[:, :2])

    def test_one_expert_and_no_tokens(self, options: dict[str, int]) -> None:
        assert (route(router_of(1, 1, **options), torch.arange(V)).expert_ids == 0).all()
        assert route(router_of(**options), torch.arange(0)).expert_ids.shape == (0, 2)

    def test_needs_the_ids_of_all_tokens(self, options: dict[str, int]) -> None:
        router, x = router_of(**options), torch.randn(4, D)
        for context in (None, RoutingContext()):
            with pytest.raises(
                ConfigError, match="the router 'hash' needs the token ids: call the model with input_ids"
            ):
                router(x, None, context)
        with pytest.raises(ConfigError, match="there are 3 token ids for 4 tokens"):
            router(x, None, RoutingContext(token_ids=torch.arange(3)))

    def test_in_the_layer(self, options: dict[str, int]) -> None:
        layer = moesaic.MoE(moesaic.MoEConfig(D, 16, E, 2, router="hash", router_options=options))
        x, ids = torch.randn(3, 5, D, requires_grad=True), torch.randint(V, (3, 5))
        layer(x, context=RoutingContext(token_ids=ids)).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert layer.last_routing is not None
        assert torch.equal(layer.last_routing.expert_ids, route(layer.router, ids).expert_ids)
        with pytest.raises(ConfigError, match="RoutingContext"):
            layer(x)


def test_a_random_hash_is_about_even_and_knows_any_id() -> None:
    router = router_of(top_k=2)
    ids = torch.arange(6000) + 10**6
    experts = route(router, ids).expert_ids
    for slot in (0, 1):
        assert (experts[:, slot].bincount(minlength=E) - 1000).abs().max() < 150
    pairs = Counter(map(tuple, experts.tolist()))
    assert len(pairs) == E * (E - 1)
    assert max(pairs.values()) < 2 * 6000 / len(pairs)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_balanced_hash_gives_each_expert_equally_many_ids_in_each_slot(top_k: int) -> None:
    experts = route(router_of(top_k=top_k, vocab_size=V), torch.arange(V)).expert_ids
    assert experts[:, 0].bincount(minlength=E).tolist() == [V // E] * E
    assert (experts.flatten().bincount(minlength=E) - top_k * V // E).abs().max() <= E
    odd = route(router_of(top_k=top_k, vocab_size=V - 1), torch.arange(V - 1)).expert_ids[:, 0].bincount(minlength=E)
    assert odd.max() - odd.min() == 1


def slow_greedy(frequencies: list[float], num_experts: int) -> list[int]:
    """Most frequent id first, each into the bucket with the fewest tokens so far (section 3.1)."""
    loads, expert_of_id = [0.0] * num_experts, [-1] * len(frequencies)
    for token in sorted(range(len(frequencies)), key=lambda v: -frequencies[v]):
        expert = loads.index(min(loads))
        expert_of_id[token] = expert
        loads[expert] += frequencies[token]
    return expert_of_id


def test_assign_is_the_papers_balanced_hash() -> None:
    router = router_of(vocab_size=V)
    frequencies = (1e6 / (torch.randperm(V) + 1)).long()  # Zipf's law
    before = route(router, torch.arange(V)).expert_ids
    router.assign(frequencies)
    after = route(router, torch.arange(V)).expert_ids
    assert after[:, 0].tolist() == slow_greedy(frequencies.tolist(), E)
    assert all(len(set(row)) == 2 for row in after.tolist())

    def spread(ids: Tensor) -> float:
        loads = torch.zeros(E).index_add(0, ids[:, 0], frequencies.float())
        return (loads.max() / loads.mean()).item()

    assert spread(after) < spread(before)
    other = router_of(vocab_size=V)
    other.load_state_dict(router.state_dict())
    assert torch.equal(route(other, torch.arange(V)).expert_ids, after)


def test_a_hash_by_frequency_waits_to_be_told() -> None:
    router, plain = router_of(vocab_size=V, by_frequency=True), router_of(vocab_size=V)
    assert router.wants_frequencies and not plain.wants_frequencies
    ids = torch.arange(V)
    assert torch.equal(route(router, ids).expert_ids, route(plain, ids).expert_ids)
    with pytest.raises(ConfigError, match="by_frequency needs vocab_size, the number of token ids: it is 0"):
        router_of(by_frequency=True)
    with pytest.raises(ConfigError, match="option 'by_frequency' of router 'hash' is 1: it must be true or false"):
        router_of(vocab_size=V, by_frequency=1)


def test_assign_needs_a_frequency_for_each_id() -> None:
    with pytest.raises(ConfigError, match="there are 3 frequencies: the router's vocab_size is 600"):
        router_of(vocab_size=V).assign(torch.ones(3))
    with pytest.raises(ConfigError, match="there are 0 frequencies: the router's vocab_size is 0"):
        router_of().assign(torch.ones(0))
    with pytest.raises(ConfigError, match="vocab_size is -1: it must be at least 0"):
        router_of(vocab_size=-1)
