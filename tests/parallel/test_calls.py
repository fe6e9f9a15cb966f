"""What a call of a layer over ranks keeps to in every mode of autograd: inference, frozen and changed weights, bf16."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf import parallel_models
from tests.parallel import harness, layers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.dispatch import Dispatch
from moesaic.parallel import use_strategy
from moesaic.parallel.sharding import forward_sharded

STRATEGIES = ("tokens", "weights", "hybrid")


def test_inference_mode() -> None:
    for errors in harness.pool(2).run(infer):
        assert max(errors.values()) < 1e-5, errors


def infer() -> dict[str, float]:
    """The largest errors of a layer and of a model, which have not been called before."""
    x_TD, _ = layers.features(dist.get_rank(), 9)
    errors = {}
    for strategy in STRATEGIES:
        layer, model = layers.layer_of({}), parallel_models.build("mixtral", 4)
        ids = parallel_models.mine(parallel_models.tokens(2))
        wanted, logits = layer(x_TD).detach(), model(ids).logits.detach()
        moesaic.parallelize(layer)
        moesaic.parallelize(model)
        with use_strategy(strategy), torch.inference_mode():
            errors[f"layer, {strategy}"] = float((layer(x_TD) - wanted).abs().max())
            errors[f"model, {strategy}"] = float((model(ids).logits - logits).abs().max())
    return errors


def test_weights_that_change_between_the_passes() -> None:
    for told in harness.pool(2).run(changed):
        assert set(told) == set(STRATEGIES)
        assert all("modified by an inplace operation" in error for error in told.values()), told


def changed() -> dict[str, str]:
    layer = moesaic.parallelize(layers.layer_of({}))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x_TD, _ = layers.features(dist.get_rank(), 9)
    told = {}
    for strategy in STRATEGIES:
        with use_strategy(strategy):
            layer(x_TD).sum().backward()
            loss = layer(x_TD).sum()
            optimizer.step()
            with pytest.raises(RuntimeError) as failure:
                loss.backward()
            told[strategy] = str(failure.value)
            layer.zero_grad()
    return told


def test_bf16_gradients_are_rounded_once() -> None:
    for errors in harness.pool(2).run(halves):
        alone = errors.pop("alone")
        assert max(errors.values()) < 1.2 * alone, (errors, alone)


def halves() -> dict[str, float]:
    """Errors of the up projections' gradient against float64: of one process, and of as many chunks as there are."""
    tokens, ranks, rank = 1024, dist.get_world_size(), dist.get_rank()
    alone = layers.layer_of({"num_experts": 4}).bfloat16()
    exact, spread = copy.deepcopy(alone).double(), moesaic.parallelize(copy.deepcopy(alone))
    ids_TK = torch.arange(2 * tokens).reshape(tokens, 2) % 4
    weights_TK = torch.full((tokens, 2), 0.5)
    inputs = [layers.features(each, tokens) for each in range(ranks)]

    def errors_of(got: Any) -> float:
        wanted = exact.experts.up.grad
        return float((got.double() - wanted).norm() / wanted.norm())

    for x_TD, upstream_TD in inputs:
        for layer, dtype in ((exact, torch.float64), (alone, torch.bfloat16)):
            routed = Dispatch.from_slots(ids_TK, weights_TK.to(dtype), 4)
            y_TD: Tensor = layer.experts(x_TD.bfloat16().to(dtype), routed)
            y_TD.backward(upstream_TD.bfloat16().to(dtype) / ranks)
    errors = {"alone": errors_of(alone.experts.up.grad)}
    x_TD, upstream_TD = (each.bfloat16() for each in inputs[rank])
    for strategy, overlap in (("tokens", 1), ("tokens", 32), ("weights", 1)):
        spread.zero_grad()
        with use_strategy(strategy, overlap=overlap):
            forward_sharded(spread.experts, x_TD, ids_TK, weights_TK).backward(upstream_TD)
        errors[f"{strategy} {overlap}"] = errors_of(spread.experts.up.grad.full_tensor())
    return errors


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointed_layers_keep_nothing(reentrant: bool | None) -> None:
    for alive, left, error in harness.pool(2).run(checkpointed, reentrant):
        assert (alive == 0) == (reentrant is not None)
        assert left == 0
        assert error < 1e-5


class Stack(nn.Sequential):
    """Layers in a residual stream, with activation checkpointing of a kind, or (None) without."""

    mode: bool | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self:
            block = functools.partial(self._block, layer)
            x_TD = block(x_TD) if self.mode is None else checkpoint(block, x_TD, use_reentrant=self.mode)
        return x_TD

    def _block(self, layer: nn.Module, x_TD: Tensor) -> Tensor:
        return torch.tanh(x_TD + layer(x_TD))


def test_a_checkpointed_step_is_timed() -> None:
    """Where nothing is saved after the experts, the second forward pass ends in them."""
    for told in harness.pool(2).run(timed):
        assert [timing.backward is not None for timing in told] == [False, True]


def timed() -> list[Any]:
    layer = moesaic.parallelize(layers.layer_of({}))
    x_TD = layers.features(dist.get_rank(), 9)[0].requires_grad_()
    checkpoint(lambda rows: rows + layer(rows), x_TD, use_reentrant=False).sum().backward()
    return list(layer.experts.parallel._timings)


def checkpointed(reentrant: bool | None) -> tuple[int, int, float]:
    """Computations alive after the forward pass, and after the backward pass; the gradients' error."""

    def alive() -> int:
        gc.collect()
        return sum(type(each).__name__ == "_Computed" for each in gc.get_objects())

    stack = Stack(*(layers.layer_of({}) for _ in range(3)))
    x_TD, upstream_TD = layers.features(dist.get_rank(), 9)
    inputs, spread = [x_TD.clone().requires_grad_() for _ in range(2)], copy.deepcopy(stack)
    stack(inputs[0]).backward(upstream_TD)
    moesaic.parallelize(spread)
    spread.mode = reentrant
    error, before = 0.0, alive()
    for strategy in (*STRATEGIES, "auto"):
        spread.zero_grad()
        inputs[1].grad = None
        with use_strategy(strategy):
            y_TD = spread(inputs[1])
            kept = alive() - before
            y_TD.backward(upstream_TD)
        del y_TD
        assert inputs[0].grad is not None and inputs[1].grad is not None
        error = max(error, float((inputs[1].grad - inputs[0].grad).abs().max()))
        for (name, whole), mine in zip(stack.named_parameters(), spread.parameters(), strict=True):
            assert whole.grad is not None and isinstance(mine.grad, DTensor), name
            total = whole.grad.clone()
            dist.all_reduce(total)
            error = max(error, float((mine.grad.full_tensor() - total / dist.get_world_size()).abs().max()))
    return kept, alive() - before, error
