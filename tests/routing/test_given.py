"""Routes that were decided ahead of the layer."""

from __future__ import annotations

import pytest
import torch

from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingContext, create_router


def layers() -> tuple[MoE, MoE]:
    """One with a router of its own, and one that is given its routes, with the same experts."""
    torch.manual_seed(0)
    own = MoE(MoEConfig(d_model=16, d_ff=24, num_experts=4))
    given = MoE(MoEConfig(d_model=16, d_ff=24, num_experts=4, router="given"))
    given.experts.load_state_dict(own.experts.state_dict())
    return own, given


def test_it_has_no_parameters_and_takes_what_it_is_given() -> None:
    own, given = layers()
    x = torch.randn(2, 5, 16)
    assert list(given.router.parameters()) == []
    routing = own.router(x.view(-1, 16))
    assert torch.equal(given(x, context=RoutingContext(given=routing)), own(x))


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("told", [False, True], ids=["no mask", "a wider mask"])
def test_who_was_masked_when_routes_were_decided_stays_so(told: bool, iterations: int) -> None:
    torch.manual_seed(0)
    layer = MoE(
        MoEConfig(16, 24, 4, balancing={"load_balancing": 1.0}, router="sigmoid_topk", iterations=iterations)
    ).train()
    x = torch.randn(2, 5, 16)
    narrow, wide = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    narrow[:, 3:], wide[0, 0] = False, False
    expected, loss = layer(x, token_mask=narrow & wide if told else narrow), layer.aux_loss
    ahead = layer.decide(x, token_mask=narrow)
    got = layer(x, token_mask=wide if told else None, context=RoutingContext(given=ahead))
    assert torch.equal(got, expected)
    assert torch.equal(layer.aux_loss, loss)
    for routing in layer.last_routings:
        assert torch.equal(routing.token_mask, (narrow & wide if told else narrow).flatten())


def test_gradients_reach_whoever_decided() -> None:
    own, given = layers()
    x = torch.randn(5, 16)
    given(x, context=RoutingContext(given=own.router(x))).square().sum().backward()
    through = own.router.weight.grad
    own.router.weight.grad = None
    own(x).square().sum().backward()
    assert through is not None
    torch.testing.assert_close(through, own.router.weight.grad)


@pytest.mark.parametrize(("tokens", "experts"), [(4, 4), (5, 8)])
def test_routes_of_other_tokens_or_experts(tokens: int, experts: int) -> None:
    _, given = layers()
    routing = create_router("softmax_topk", 16, experts, 2)(torch.randn(tokens, 16))
    with pytest.raises(ConfigError, match=f"the given routing is for {tokens} tokens and {experts} experts, but the"):
        given(torch.randn(5, 16), context=RoutingContext(given=routing))


def test_nothing_given() -> None:
    with pytest.raises(ConfigError, match="the router 'given' decides nothing"):
        layers()[1](torch.randn(5, 16))
