"""The ReLU router, its two losses and its two numbers, against a reference of plain loops in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moesaic
from moesaic.errors import ConfigError
from moesaic.routing import BALANCERS, Routing, chunk_sparsity, create_router, token_sparsity
from moesaic.routing.relu import ReLURouter

NULL = -1


def added(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def route(
    token: Tensor, weight: Tensor, gain: Tensor, top_k: int, eps: float = 1e-5
) -> tuple[list[int], list[Tensor], list[Tensor], list[Tensor]]:
    """The slots, the weights, the shares and the logits of one token."""
    logits = [(token * row).sum() for row in weight]
    active = [logit if logit > 0 else 0 * logit for logit in logits]
    mean_square = added([a * a for a in active]) / len(active)
    normed = [a / (mean_square + eps).sqrt() * g for a, g in zip(active, gain, strict=True)]
    order = sorted(range(len(logits)), key=lambda e: -logits[e].item())
    taken = [e for e in order if logits[e] > 0][:top_k]
    missing = top_k - len(taken)
    total = added(active) + eps
    weights = [normed[e] for e in taken] + [0 * logits[0]] * missing
    return taken + [NULL] * missing, weights, [a / total for a in active], logits


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + (-value).exp())


def locality(sequences: list[list[list[Tensor]]], steepness: float) -> Tensor:
    """``sequences``: of tokens, of logits."""
    terms = []
    for tokens in sequences:
        for left, right in pairwise(tokens):
            for a, b in zip(left, right, strict=True):
                p, target = sigmoid(steepness * a), sigmoid(steepness * b)
                terms.append(-(target * p.log() + (1 - target) * (1 - p).log()))
    return added(terms) / len(terms)


def chunks(sequences: list[list[list[Tensor]]], length: int) -> Tensor:
    """``sequences``: of tokens, of shares."""
    terms = []
    for tokens in sequences:
        for start in range(0, len(tokens), length):
            for e in range(len(tokens[0])):
                idle = tokens[0][0] * 0 + 1
                for p in tokens[start : start + length]:
                    idle = idle * (1 - p[e])
                terms.append(1 - idle)
    return added(terms) / len(terms)


def split(rows: list[Any], length: int) -> list[list[Any]]:
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def build(num_experts: int = 8, top_k: int = 8, std: float = 0.1, **options: Any) -> ReLURouter:
    torch.manual_seed(0)
    router = create_router("relu", 16, num_experts, top_k, **options)
    assert isinstance(router, ReLURouter)
    router.reset_parameters(std)
    nn.init.uniform_(router.gain, 0.5, 1.5)
    return router


def balancer(name: str, **options: Any) -> Any:
    return BALANCERS.get(name)(**options)


def ids_of(routing: Routing) -> list[list[int]]:
    return [[NULL if e == routing.num_experts else e for e in row] for row in routing.expert_ids.tolist()]


@pytest.mark.parametrize(("num_experts", "top_k", "length"), [(8, 8, 12), (8, 3, 16), (8, 1, 1), (1, 1, 5), (5, 5, 7)])
def test_against_the_reference(num_experts: int, top_k: int, length: int) -> None:
    router = build(num_experts, top_k)
    x = torch.randn(3 * length, 16, requires_grad=True)
    routing = router(x)
    routing.sequence_length = length
    losses = [balancer("chunk_sparsity").loss(routing, routing.counts())]
    if length > 1:
        losses.append(balancer("activation_locality", steepness=5.0).loss(routing, routing.counts()))

    x64 = x.detach().double().requires_grad_()
    weight64, gain64 = (p.detach().double().requires_grad_() for p in (router.weight, router.gain))
    rows = [route(token, weight64, gain64, top_k) for token in x64]
    losses64 = [chunks(split([row[2] for row in rows], length), 8)]
    if length > 1:
        losses64.append(locality(split([row[3] for row in rows], length), 5.0))

    assert ids_of(routing) == [row[0] for row in rows]
    weights64 = torch.stack([torch.stack(row[1]) for row in rows])
    torch.testing.assert_close(routing.weights.double(), weights64, rtol=1e-4, atol=1e-5)
    for loss, loss64 in zip(losses, losses64, strict=True):
        torch.testing.assert_close(loss.double(), loss64, rtol=1e-4, atol=1e-5)
    pull = torch.randn(3 * length, top_k, dtype=torch.float64)
    ((routing.weights * pull.float()).sum() + added(losses)).backward()
    ((weights64 * pull).sum() + added(losses64)).backward()
    pairs = [(x, x64), (router.weight, weight64), (router.gain, gain64)]
    if num_experts == 1:  # there the share is 1 whatever the logit: 1 - p has no digits left in float32
        pairs = pairs[2:]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]


def test_a_token_takes_as_many_experts_as_it_has_positive_logits() -> None:
    router = build()
    x = torch.randn(200, 16)
    routing = router(x)
    wanted = ((x @ router.weight.T) > 0).sum(dim=1)
    assert torch.equal((routing.expert_ids < 8).sum(dim=1), wanted)
    assert wanted.unique().numel() > 3
    assert (routing.weights[routing.expert_ids == 8] == 0).all()
    limited = router(x, 2)
    assert torch.equal((limited.expert_ids < 8).sum(dim=1), wanted.clamp(max=2))
    assert torch.equal(limited.expert_ids, routing.expert_ids[:, :2])


def test_no_positive_logit_is_no_expert_and_no_bad_gradient() -> None:
    layer = moesaic.MoE(
        moesaic.MoEConfig(d_model=16, d_ff=8, num_experts=4, top_k=4, router="relu", balancing={"load_balancing": 0.1})
    )
    x = torch.zeros(3, 16, requires_grad=True)
    y = layer(x)
    assert (y == 0).all() and (layer.last_routing.expert_ids == 4).all()  # type: ignore[union-attr]
    (y.sum() + layer.aux_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad is not None and x.grad.isfinite().all()


def test_all_tokens_alike_and_no_token() -> None:
    router = build()
    alike = router(torch.randn(1, 16).expand(16, 16))
    assert (alike.expert_ids == alike.expert_ids[0]).all()
    assert chunk_sparsity(alike) == token_sparsity(alike)
    empty = router(torch.zeros(0, 16))
    assert list(empty.expert_ids.shape) == list(empty.weights.shape) == [0, 8]
    for name in ("chunk_sparsity", "activation_locality"):
        assert balancer(name).loss(empty, empty.counts()) == 0
    assert token_sparsity(empty).isnan() and chunk_sparsity(empty).isnan()


def test_bf16_features_are_routed_in_float32() -> None:
    router, x = build(), torch.randn(30, 16, dtype=torch.bfloat16)
    routing = router(x)
    assert routing.weights.dtype == routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.weights, router(x.float()).weights)


def by_hand(rows: list[list[int]], num_experts: int, **fields: Any) -> Routing:
    ids = torch.tensor([[num_experts if e == NULL else e for e in row] for row in rows])
    return Routing(ids, torch.ones(ids.shape), torch.ones(len(rows), num_experts), **fields)


def test_sparsity_of_tokens_and_chunks() -> None:
    rows = [[0, NULL], [1, NULL], [0, 1], [NULL, NULL], [3, NULL], [3, 2], [3, NULL]]
    routing = by_hand(rows, 4)
    assert token_sparsity(routing).item() == pytest.approx(1 - 8 / 28)
    # {0, 1}, {0, 1}, {2, 3}; the seventh token has no neighbour.
    assert chunk_sparsity(routing, 2).item() == pytest.approx(1 - 6 / 12)
    assert chunk_sparsity(routing, 3).item() == pytest.approx(1 - 4 / 8)
    assert chunk_sparsity(routing, 7).item() == 0
    assert chunk_sparsity(routing, 8).isnan()


def test_chunks_do_not_cross_sequences() -> None:
    rows = [[0], [0], [1], [1], [1], [0]]
    assert (
        chunk_sparsity(by_hand(rows, 2, sequence_length=3), 2).item() == 0.5
    )  # {0}, and {1}; tokens 2, 5 are left over
    assert chunk_sparsity(by_hand(rows, 2), 2).item() == pytest.approx(2 / 6)  # {0}, {1}, {0, 1}


def test_sparsity_counts_ffn_experts_and_tokens_only() -> None:
    routing = by_hand([[0, 2], [1, 3], [0, 1], [0, 2]], 4, num_ffn=2)
    assert token_sparsity(routing).item() == pytest.approx(1 - 5 / 8)
    mask = torch.tensor([True, True, True, False])
    assert token_sparsity(routing, mask).item() == pytest.approx(1 - 4 / 6)
    assert chunk_sparsity(routing, 2, mask).item() == 0
    assert chunk_sparsity(routing, 2, ~mask).isnan()


def test_padding_does_not_count_in_the_losses() -> None:
    router, x = build(), torch.randn(10, 16)
    padded = torch.cat([torch.ones(3, 16), x]).repeat(2, 1)  # two sequences, padded on the left
    hidden = torch.tensor([True] * 3 + [False] * 10).repeat(2).unsqueeze(1)
    routing = router(padded).without(hidden)
    routing.sequence_length, routing.token_mask = 13, ~hidden.squeeze(1)
    alone = router(x)
    loss = balancer("activation_locality").loss
    torch.testing.assert_close(loss(routing, routing.counts()), loss(alone, alone.counts()))
    loss = balancer("chunk_sparsity", chunk_length=13).loss
    torch.testing.assert_close(loss(routing, routing.counts()), loss(alone, alone.counts()))
    everywhere = router(padded).without(torch.ones_like(hidden))
    everywhere.token_mask = torch.zeros(26, dtype=torch.bool)
    assert loss(everywhere, everywhere.counts()) == 0


def test_padding_with_negative_logits_only_does_not_count() -> None:
    names = ("activation_locality", "chunk_sparsity", "load_balancing", "z_loss")
    config = moesaic.MoEConfig(
        d_model=16, d_ff=8, num_experts=8, top_k=8, router="relu", balancing=dict.fromkeys(names, 1.0)
    )
    layer = moesaic.MoE(config)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(8, 16).abs())
    x = torch.randn(1, 10, 16)
    x[0, 4] = -1.0  # a token that takes no expert, but is one
    layer(x)
    wanted = dict(layer.balancers[0].losses)
    routing = layer.last_routing
    assert routing is not None and (routing.expert_ids[4] == 8).all()
    sparsity = token_sparsity(routing)
    padded = torch.cat([x.new_full((1, 16, 16), -1.0), x], dim=1)
    layer(padded, token_mask=torch.arange(26).unsqueeze(0) >= 16)
    assert layer.last_routing is not None and layer.last_routing.token_mask is not None
    assert layer.last_routing.token_mask.tolist() == [False] * 16 + [True] * 10
    torch.testing.assert_close(token_sparsity(layer.last_routing), sparsity)
    for name in names:
        torch.testing.assert_close(layer.balancers[0].losses[name], wanted[name])


def test_a_token_without_experts_counts_in_the_means() -> None:
    """Over a part with such a token and one without, weighted by the tokens, the z-loss is that of all tokens."""
    balancing = {"z_loss": 1.0}
    layer = moesaic.MoE(moesaic.MoEConfig(16, 8, 4, 4, router="relu", balancing=balancing))
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(4, 16).abs())
    x = torch.randn(6, 16)
    x[1] = -1.0
    layer(x)
    logits = x.double() @ layer.router.weight.double().T
    wanted = 0.0
    for row in logits.tolist():
        wanted += math.log(sum(math.exp(value) for value in row)) ** 2 / 6
    assert layer.aux_loss.item() == pytest.approx(wanted, rel=1e-5)


def test_the_losses_do_what_they_are_for() -> None:
    """A few steps on the losses alone make neighbours alike, and chunks sparse."""
    for name, number in (("activation_locality", None), ("chunk_sparsity", chunk_sparsity)):
        router = build()
        x = torch.randn(32, 16)
        optimizer = torch.optim.SGD(router.parameters(), lr=0.5 if number else 0.002)
        values = []
        for _ in range(30):
            routing = router(x)
            loss = balancer(name).loss(routing, routing.counts())
            values.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert values[-1] < values[0]
        assert math.isfinite(values[-1])


def test_options_and_routers_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"eps is 0\.0: it must be above 0"):
        build(eps=0.0)
    with pytest.raises(ConfigError, match="steepness is 0: it must be above 0"):
        balancer("activation_locality", steepness=0)
    with pytest.raises(ConfigError, match="chunk_length is 0: it must be at least 1"):
        balancer("chunk_sparsity", chunk_length=0)
    with pytest.raises(ConfigError, match="needs a router whose experts are active where their logit is positive"):
        moesaic.MoEConfig(d_model=8, d_ff=8, num_experts=2, balancing={"activation_locality": 0.1})
