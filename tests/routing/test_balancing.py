"""Balancing losses at points where their value is known, and the bias update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests import reference
from torch import Tensor

from moesaic import MoEConfig
from moesaic.errors import ConfigError
from moesaic.routing import BALANCERS, ROUTERS, Routing, balance_loss, check_balancing, create_router


def even(num_tokens: int = 12, num_experts: int = 4, top_k: int = 2) -> Routing:
    ids = torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts
    scores = torch.full((num_tokens, num_experts), 1 / num_experts)
    return Routing(ids, torch.full(ids.shape, 0.5), scores, torch.zeros(num_tokens, num_experts))


class TestLoadBalancing:
    def loss(self, routing: Routing) -> float:
        return balance_loss(routing, {"load_balancing": 1.0}).item()

    @pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 4), (3, 3)])
    def test_is_one_for_an_even_load(self, experts: int, top_k: int) -> None:
        assert self.loss(even(24, experts, top_k)) == pytest.approx(1.0)

    def test_is_the_number_of_experts_where_one_takes_all(self) -> None:
        routing = Routing(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.eye(5)[:1].expand(6, 5))
        assert self.loss(routing) == pytest.approx(5.0)

    def test_scores_that_do_not_sum_to_one_are_shares(self) -> None:
        routing = even()
        routing.scores = routing.scores * torch.rand(12, 1)
        assert self.loss(routing) == pytest.approx(1.0)

    def test_tokens_without_any_expert_do_not_count(self) -> None:
        routing = even()
        hidden = torch.zeros(12, 1, dtype=torch.bool)
        hidden[4:] = True
        routing.scores = torch.where(hidden, torch.tensor([1.0, 0, 0, 0]), routing.scores)
        assert self.loss(routing.without(hidden)) == pytest.approx(1.0)

    def test_the_layers_mask_says_which_tokens_count(self) -> None:
        routing = even()
        routing.scores = torch.where(torch.arange(12).unsqueeze(1) < 4, torch.eye(4)[:1], routing.scores)
        nobody = torch.ones(12, 1, dtype=torch.bool)
        nobody[:8] = False  # of the last four none took an expert, yet they are tokens
        routing = routing.without(nobody)
        wanted = 4 * (0.25 * (4 * 1 + 8 * 0.25) / 12 + 3 * 0.25 * 8 * 0.25 / 12)
        assert self.loss(replace(routing, token_mask=torch.ones(12, dtype=torch.bool))) == pytest.approx(wanted)
        routing = replace(routing, scores=torch.eye(4)[:1].expand(12, 4), token_mask=torch.zeros(12, dtype=torch.bool))
        assert self.loss(routing) == 0.0

    def test_nothing_routed_is_no_loss(self) -> None:
        routing = even()
        assert self.loss(routing.without(torch.ones(12, 1, dtype=torch.bool))) == 0.0

    def test_the_gradient_pushes_the_crowded_expert_down(self) -> None:
        logits = torch.zeros(8, 4, requires_grad=True)
        routing = Routing(torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1), logits.softmax(-1), logits)
        balance_loss(routing, {"load_balancing": 1.0}).backward()
        assert (logits.grad[:, 0] > 0).all()
        assert (logits.grad[:, 1:] < 0).all()


class TestZLoss:
    def test_of_equal_logits(self) -> None:
        assert balance_loss(even(num_experts=4), {"z_loss": 1.0}).item() == pytest.approx(math.log(4) ** 2)

    def test_needs_logits(self) -> None:
        routing = even()
        routing.logits = None
        with pytest.raises(ConfigError, match="'z_loss' needs a router that has logits"):
            balance_loss(routing, {"z_loss": 1.0})

    def test_is_refused_where_there_are_none(self) -> None:
        with pytest.raises(ConfigError, match="'z_loss' needs a router that has logits; Hash has none"):
            MoEConfig(d_model=4, d_ff=4, num_experts=2, router="hash", balancing={"z_loss": 1.0})


class TestBiasUpdate:
    def update(self, counts: list[int], coefficient: float = 0.1) -> Tensor:
        router = create_router("sigmoid_topk", 4, len(counts), 1)
        BALANCERS.get("bias_update")().update(router, torch.tensor(counts), coefficient)
        return router.get_buffer("selection_bias")

    @pytest.mark.parametrize("counts", [[5, 1, 3, 3], [0, 0, 0, 8], [2, 2, 2, 2], [0, 0, 0, 0], [7, 0, 0, 0]])
    def test_is_the_papers_step(self, counts: list[int]) -> None:
        assert self.update(counts).tolist() == pytest.approx(reference.updated_bias([0.0] * 4, counts, 0.1))

    def test_has_no_loss(self) -> None:
        assert BALANCERS.get("bias_update")().loss(even(), even().counts()) is None
        assert balance_loss(even(), {"bias_update": 1.0}).item() == 0.0

    def test_needs_a_selection_bias(self) -> None:
        with pytest.raises(
            ConfigError, match="'bias_update' needs a router with a selection_bias; SoftmaxTopK has none"
        ):
            check_balancing({"bias_update": 0.1}, ROUTERS.get("softmax_topk"))
        check_balancing({"bias_update": 0.1}, ROUTERS.get("sigmoid_topk"))


def test_losses_add_up_with_their_coefficients() -> None:
    routing = even()
    total = balance_loss(routing, {"load_balancing": 0.5, "z_loss": 2.0}).item()
    assert total == pytest.approx(0.5 + 2.0 * math.log(4) ** 2)
    assert balance_loss(routing, {}).shape == ()
    assert balance_loss(routing, {}).item() == 0.0


def test_what_cannot_be_balanced_with() -> None:
    router = ROUTERS.get("sigmoid_topk")
    with pytest.raises(ConfigError, match=r"unknown balancer 'load_balance': did you mean 'load_balancing'\?"):
        check_balancing({"load_balance": 0.1}, router)
    for wrong in (-0.1, math.nan, math.inf):
        message = f"the coefficient of balancer 'z_loss' is {wrong}: it must be finite and at least 0"
        with pytest.raises(ConfigError, match=message):
            check_balancing({"z_loss": wrong}, router)


def test_what_is_no_balancer_is_refused_when_it_is_registered() -> None:
    class Lonely:
        def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
            return counts_E.float().mean()

    with pytest.raises(
        ConfigError, match=r"the balancer 'lonely' must be a class derived from Balancer: it is .*Lonely"
    ):
        BALANCERS.register("lonely")(Lonely)  # type: ignore[arg-type]
    assert "lonely" not in BALANCERS
