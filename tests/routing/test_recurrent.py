"""The recurrent router, against a reference of plain loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.routing import Routing, RoutingContext, create_router
from moesaic.routing.recurrent import RecurrentTopK


def added(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def dot(row: Tensor, vector: list[Tensor]) -> Tensor:
    terms = [a * b for a, b in zip(row, vector, strict=True)]
    return added(terms)


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + (-value).exp())


def gru(x: list[Tensor], h: list[Tensor], cell: Mapping[str, Tensor]) -> list[Tensor]:
    """One step of a gated recurrent unit; its matrices hold the rows for reset, update and new value, in this order."""
    width = len(h)

    def from_x(part: int, i: int) -> Tensor:
        return dot(cell["weight_ih"][part * width + i], x) + cell["bias_ih"][part * width + i]

    def from_h(part: int, i: int) -> Tensor:
        return dot(cell["weight_hh"][part * width + i], h) + cell["bias_hh"][part * width + i]

    new = []
    for i in range(width):
        reset = sigmoid(from_x(0, i) + from_h(0, i))
        update = sigmoid(from_x(1, i) + from_h(1, i))
        value = (from_x(2, i) + reset * from_h(2, i)).tanh()
        new.append((1 - update) * value + update * h[i])
    return new


def route_through(
    features: list[Tensor], layers: Sequence[Mapping[str, Tensor]], cells: Sequence[Mapping[str, Tensor]], top_k: int
) -> list[tuple[list[int], list[Tensor], list[Tensor]]]:
    """One token, with its features in every layer: slots, normalized weights and state of each layer."""
    state = [0 * features[0][0]] * layers[0]["projection"].shape[0]
    answers = []
    for x, layer, cell in zip(features, layers, cells, strict=True):
        projected = [dot(row, list(x)) for row in layer["projection"]]
        state = gru(projected, state, cell)
        powers = [dot(row, state).exp() for row in layer["weight"]]
        taken = sorted(range(len(powers)), key=lambda e: -powers[e].item())[:top_k]
        total = added([powers[e] for e in taken])
        answers.append((taken, [powers[e] / total for e in taken], state))
    return answers


def stack(number: int, num_experts: int = 6, top_k: int = 2, **options: Any) -> list[RecurrentTopK]:
    torch.manual_seed(0)
    routers: list[RecurrentTopK] = []
    for _ in range(number):
        router = create_router("recurrent", 8, num_experts, top_k, **{"state_width": 5, **options})
        assert isinstance(router, RecurrentTopK)
        router.reset_parameters(0.7)
        routers.append(router)
    for router in routers:
        router.follow(routers[0])
    return routers


def run(routers: list[RecurrentTopK], x_LTD: Tensor) -> list[Routing]:
    """The features of each layer are given, the state goes from layer to layer."""
    carried, routings = None, []
    for router, x_TD in zip(routers, x_LTD, strict=True):
        routings.append(router(x_TD, None, RoutingContext(carried=carried)))
        carried = routings[-1].carry
    return routings


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 2), (6, 6), (1, 1)])
def test_against_the_reference(num_experts: int, top_k: int, shared: bool) -> None:
    routers = stack(3, num_experts, top_k, shared=shared)
    x = torch.randn(3, 7, 8, requires_grad=True)
    routings = run(routers, x)

    x64 = x.detach().double().requires_grad_()
    layers = [{k: p.detach().double().requires_grad_() for k, p in r.named_parameters(recurse=False)} for r in routers]
    owners = [routers[0]] * 3 if shared else routers
    own = {r: {k: p.detach().double().requires_grad_() for k, p in r.cell.named_parameters()} for r in set(owners)}  # type: ignore[union-attr]
    cells: list[Mapping[str, Tensor]] = [own[r] for r in owners]
    rows = [route_through(list(x64[:, t]), layers, cells, top_k) for t in range(7)]

    pull = torch.randn(3, 7, top_k, dtype=torch.float64)
    total, total64 = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for number, routing in enumerate(routings):
        assert routing.expert_ids.tolist() == [row[number][0] for row in rows]
        weights64 = torch.stack([torch.stack(row[number][1]) for row in rows])
        state64 = torch.stack([torch.stack(row[number][2]) for row in rows])
        torch.testing.assert_close(routing.weights.double(), weights64, rtol=1e-4, atol=1e-6)
        assert routing.carry is not None
        torch.testing.assert_close(routing.carry.double(), state64, rtol=1e-4, atol=1e-6)
        total = total + (routing.weights * pull[number].float()).sum()
        total64 = total64 + (weights64 * pull[number]).sum()
    total.backward()
    total64.backward()
    assert x.grad is not None and x64.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-5)
    pairs = [(getattr(r, k), p) for r, layer in zip(routers, layers, strict=True) for k, p in layer.items()]
    pairs += [(getattr(r.cell, k), p) for r, cell in own.items() for k, p in cell.items()]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)
    if num_experts > 1:
        assert x.grad[0].abs().sum() > 0


def test_the_first_layer_matters_in_the_last_one() -> None:
    routers = stack(3)
    x = torch.randn(3, 7, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(run(routers, x)[-1].logits.sum(), x)  # type: ignore[union-attr]
    assert all(gradient[number].abs().sum() > 0 for number in range(3))
    assert run(routers, x)[-1].logits is not None


def test_a_token_is_routed_by_itself() -> None:
    """So that generation with a cache, which computes one token at a time, routes as the whole forward does."""
    routers = stack(3)
    x = torch.randn(3, 7, 8)
    together = run(routers, x)
    for t in range(7):
        for ours, alone in zip(together, run(routers, x[:, t : t + 1]), strict=True):
            torch.testing.assert_close(ours.weights[t : t + 1], alone.weights)
            assert torch.equal(ours.expert_ids[t : t + 1], alone.expert_ids)


def test_one_gru_for_all_layers_is_there_once() -> None:
    model = nn.ModuleList(stack(3))
    first = model[0]
    assert isinstance(first, RecurrentTopK)
    names = [name for name in model.state_dict() if "cell" in name]
    assert names == [f"0.cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert len(list(model.parameters())) == 3 * 2 + 4
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 4, 8)
    for other in (twin, model.to(torch.float64).to(torch.float32)):
        with torch.no_grad():
            nn.init.zeros_(other[0].cell.weight_ih)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(other[0].cell.bias_ih)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(other[0].cell.bias_hh)  # type: ignore[union-attr, arg-type]
        assert all((routing.carry == 0).all() for routing in run(list(other), x))  # type: ignore[union-attr, arg-type]


def test_alone_a_router_is_the_first_one() -> None:
    (router,) = stack(1)
    x = torch.randn(4, 8)
    assert torch.equal(router(x).weights, router(x, None, RoutingContext()).weights)
    zeros = RoutingContext(carried=torch.zeros(4, 5))
    torch.testing.assert_close(router(x).weights, router(x, None, zeros).weights)


def test_no_token_and_tokens_alike() -> None:
    routers = stack(2)
    empty = run(routers, torch.zeros(2, 0, 8))[-1]
    assert list(empty.expert_ids.shape) == [0, 2] and list(empty.carry.shape) == [0, 5]  # type: ignore[union-attr]
    alike = run(routers, torch.randn(2, 1, 8).expand(2, 5, 8))[-1]
    assert (alike.expert_ids == alike.expert_ids[0]).all()


def test_bf16_features_and_autocast_are_routed_in_float32() -> None:
    routers, x = stack(2), torch.randn(2, 9, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = run(routers, x)[-1]
    assert routing.weights.dtype == routing.carry.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(routing.weights, run(routers, x.float())[-1].weights)


def test_the_logits_can_be_shifted() -> None:
    (router,) = stack(1)
    router.logit_shift = torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0, 0.0])
    assert (router(torch.randn(4, 8)).expert_ids[:, 0] == 2).all()


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="state_width is 0: it must be at least 1"):
        stack(1, state_width=0)
    with pytest.raises(ConfigError, match="only with one of state_width = 5"):
        stack(1)[0].follow(stack(1, state_width=6)[0])
    with pytest.raises(ConfigError, match="only with one of state_width = 5"):
        stack(1)[0].follow(create_router("softmax_topk", 8, 6, 2))


def test_the_routers_of_a_lone_layers_iterations_share_one_gru() -> None:
    def layer_of(iterations: int, **options: Any) -> MoE:
        settings = {"router": "recurrent", "router_options": {"state_width": 5, **options}}
        return MoE(MoEConfig(d_model=8, d_ff=4, num_experts=3, top_k=1, iterations=iterations, **settings))

    one, three = layer_of(1), layer_of(3)
    assert {name for name in one.state_dict() if "cell" in name} == {
        name for name in three.state_dict() if "cell" in name
    }
    assert len([name for name in layer_of(3, shared=False).state_dict() if "bias_ih" in name]) == 3
    three = copy.deepcopy(three)
    three(torch.randn(6, 8)).sum().backward()
    assert three.router.cell.weight_ih.grad.abs().sum() > 0
    before = layer_of(1)
    for router in three.routers:
        router.follow(before.router)
    assert not any("cell" in name for name in three.state_dict())
    three(torch.randn(6, 8)).sum().backward()
    assert before.router.cell.weight_ih.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_a_router_that_was_followed_may_follow_another() -> None:
    first, second = stack(1)[0], stack(2)
    second[0].follow(first)
    second[1](torch.randn(3, 8)).weights.sum().backward()
    assert second[1]._common() is first.cell
