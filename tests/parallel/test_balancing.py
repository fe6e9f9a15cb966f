"""The loss over the global batch: of four processes, with forwards of uneven length and padding, it is that of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic import MoE, MoEConfig, update_balancing
from moesaic.routing import counting

WIDTH, EXPERTS, RANKS = 8, 6, 4
# Tokens of each rank in each of three forwards, and of how many of them only the first ones are no padding.
UNEVEN = [[5, 9, 1], [12, 3, 7], [2, 2, 2], [8, 0, 11]]
EVEN = [[4, 4, 4]] * RANKS


class Model(nn.Module):
    """Two layers, the second one reading the first one's output."""

    def __init__(self, checkpointed: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = {"num_experts": EXPERTS, "top_k": 2, "balancing": {"global_load_balancing": 1.0}, **settings}
        self.layers = nn.ModuleList(MoE(MoEConfig(d_model=WIDTH, d_ff=10, **config)) for _ in range(2))
        self.checkpointed = checkpointed
        with torch.no_grad():
            for layer in self.moe:
                for parameter in layer.router.parameters():
                    parameter.mul_(25)

    @property
    def moe(self) -> list[MoE]:
        layers: Any = self.layers
        return list(layers)

    def forward(self, x_TD: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the balancing losses."""
        losses = []
        for layer in self.moe:

            def run(h_TD: Tensor, layer: MoE = layer) -> tuple[Tensor, Tensor]:
                return h_TD + layer(h_TD, token_mask=mask_T), layer.aux_loss

            x_TD, loss = checkpoint(run, x_TD, use_reentrant=False) if self.checkpointed else run(x_TD)
            losses.append(loss)
        return x_TD, torch.stack(losses).sum()


def parts_of(rank: int, lengths: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Features and mask of each of a rank's forwards; of the uneven ones about a third is padding."""
    draw = torch.Generator().manual_seed(100 + rank)
    parts = []
    for tokens in lengths[rank]:
        x_TD = torch.randn(tokens, WIDTH, generator=draw) + torch.linspace(0, rank, WIDTH)
        parts.append((x_TD, torch.rand(tokens, generator=draw) < (0.7 if lengths is UNEVEN else 1.0)))
    return parts


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    return found


def whole_batch(
    lengths: Sequence[Sequence[int]], **settings: Any
) -> tuple[float, dict[str, Tensor], list[Tensor], list[int]]:
    """One process sees everything at once: loss, its gradients by the parameters and by the tokens; counts."""
    model = Model(**settings)
    parts = [part for rank in range(RANKS) for part in parts_of(rank, lengths)]
    tokens = [x_TD.requires_grad_() for x_TD, _ in parts]
    _, loss = model(torch.cat(tokens), torch.cat([mask_T for _, mask_T in parts]))
    loss.backward()
    wanted = [torch.zeros_like(x_TD) if x_TD.grad is None else x_TD.grad for x_TD in tokens]
    return float(loss.detach()), gradients(model), wanted, model.moe[0].balancers[0].slot_counts.tolist()


def on_rank(
    lengths: list[list[int]], exact: bool, checkpointed: bool, spread: bool, settings: dict[str, Any]
) -> tuple[float, dict[str, Tensor], list[Tensor], list[int]]:
    """A step with accumulation on one rank of four: loss and weights' gradients of all, its own tokens'; counts."""
    rank, model = dist.get_rank(), Model(checkpointed, **settings)
    if spread:
        moesaic.parallelize(model)
    parts = parts_of(rank, UNEVEN if lengths == UNEVEN else lengths)
    total = torch.tensor(float(sum(int(mask_T.sum()) for _, mask_T in parts)))
    dist.all_reduce(total)
    tokens = [x_TD.requires_grad_() for x_TD, _ in parts]
    if exact:
        with counting(model):
            for x_TD, mask_T in parts:
                model(x_TD, mask_T)
    loss = torch.zeros(())
    for x_TD, mask_T in parts:
        _, own = model(x_TD, mask_T)
        weighted = own * mask_T.sum() / total
        (weighted * (RANKS if spread else 1)).backward()  # parallelize takes the mean over the ranks
        loss += weighted.detach()
    dist.all_reduce(loss)
    found = gradients(model)
    for gradient in found.values():
        if not spread:
            dist.all_reduce(gradient)
    counts = model.moe[0].balancers[0].slot_counts.tolist()
    update_balancing(model)
    assert not any(layer.balancers[0].slot_counts.any() for layer in model.moe)
    own_gradients = [torch.zeros_like(x_TD) if x_TD.grad is None else x_TD.grad for x_TD in tokens]
    return float(loss), found, [g / (RANKS if spread else 1) for g in own_gradients], counts


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "relu"])
@pytest.mark.parametrize("spread", [False, True], ids=["plain", "parallelized"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_four_processes_with_accumulation_are_one(checkpointed: bool, spread: bool, router: str) -> None:
    settings = {"router": router}
    loss, wanted, by_token, slots = whole_batch(UNEVEN, **settings)
    answers = harness.pool(RANKS).run(on_rank, UNEVEN, True, checkpointed, spread, settings)
    for got, found, _, counts in answers:
        assert got == pytest.approx(loss, rel=1e-6)
        assert counts == slots
        assert found.keys() >= {"layers.0.router.weight", "layers.1.router.weight"}
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    mine = [gradient for _, _, own, _ in answers for gradient in own]
    for one, other in zip(mine, by_token, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def reference(counts_E: Tensor, scores_TE: Tensor) -> float:
    """E · Σ f · P in loops."""
    loss = 0.0
    for e in range(EXPERTS):
        share = sum(float(row[e] / row.sum()) for row in scores_TE.double()) / len(scores_TE)
        loss += float(counts_E[e]) / float(counts_E.sum()) * share
    return EXPERTS * loss


def running(lengths: list[list[int]], spread: bool, checkpointed: bool) -> list[tuple[float, list[int], Tensor]]:
    """Without counting ahead: each forward's loss of the first layer, its own counts, and its scores."""
    model = Model(checkpointed)
    if spread:
        moesaic.parallelize(model)
    told = []
    for x_TD, mask_T in parts_of(dist.get_rank(), lengths):
        _, loss = model(x_TD, mask_T)
        first = model.moe[0]
        routing = first.last_routing
        assert routing is not None
        told.append((float(first.aux_loss.detach()), routing.counts().tolist(), routing.scores))
        loss.backward()
    return told


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("spread", [False, True], ids=["plain", "parallelized"])
def test_the_running_counts_are_of_all_ranks_and_of_the_forwards_so_far(spread: bool, checkpointed: bool) -> None:
    answers = harness.pool(RANKS).run(running, EVEN, spread, checkpointed)
    so_far = torch.zeros(EXPERTS)
    for number in range(len(EVEN[0])):
        so_far += sum(torch.tensor(told[number][1]) for told in answers)
        for told in answers:
            loss, _, scores_TE = told[number]
            assert loss == pytest.approx(reference(so_far, scores_TE), rel=1e-5)


def ddp(exact: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Two steps of PyTorch's DistributedDataParallel, with three forwards each: gradients of the second, biases."""
    settings = {"router": "sigmoid_topk", "balancing": {"global_load_balancing": 1.0, "bias_update": 0.25}}
    model = Model(**settings)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    parts = parts_of(dist.get_rank(), EVEN)
    for _ in range(2):
        wrapped.zero_grad()
        with counting(wrapped):
            for part in parts:
                wrapped(*part)
        for part in parts:
            (wrapped(*part)[1] / len(parts)).backward()
        update_balancing(wrapped)
    return gradients(model), model.moe[0].router.get_buffer("selection_bias").tolist()


def test_distributed_data_parallel() -> None:
    settings = {"router": "sigmoid_topk", "balancing": {"global_load_balancing": 1.0, "bias_update": 0.25}}
    model = Model(**settings)
    parts = [part for rank in range(RANKS) for part in parts_of(rank, EVEN)]
    for _ in range(2):
        model.zero_grad()
        model(torch.cat([x_TD for x_TD, _ in parts]), torch.cat([mask_T for _, mask_T in parts]))[1].backward()
        update_balancing(model)
    bias = model.moe[0].router.get_buffer("selection_bias").tolist()
    for found, got in harness.pool(RANKS).run(ddp, True):
        assert got == bias
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def own_tokens(spread: bool) -> tuple[float, float, list[int], Tensor]:
    """The losses of this rank's tokens alone and of all ranks', as a layer says them."""
    balancing = {"load_balancing": {"coefficient": 1.0, "per_rank": True}, "global_load_balancing": 1.0}
    layer = Model(balancing=balancing)
    if spread:
        moesaic.parallelize(layer)
    layer(*parts_of(dist.get_rank(), EVEN)[0])
    losses, routing = layer.moe[0].balancers[0].losses, layer.moe[0].last_routing
    assert routing is not None
    return (
        float(losses["load_balancing"]),
        float(losses["global_load_balancing"]),
        routing.counts().tolist(),
        routing.scores,
    )


@pytest.mark.parametrize("spread", [False, True], ids=["plain", "parallelized"])
def test_a_ranks_own_loss_beside_that_of_all(spread: bool) -> None:
    answers = harness.pool(RANKS).run(own_tokens, spread)
    everybody = sum(torch.tensor(counts) for _, _, counts, _ in answers)
    for own, of_all, counts, scores_TE in answers:
        assert own == pytest.approx(reference(torch.tensor(counts), scores_TE), rel=1e-5)
        assert of_all == pytest.approx(reference(everybody, scores_TE), rel=1e-5)
