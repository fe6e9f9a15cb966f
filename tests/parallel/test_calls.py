"""What a call of a layer over ranks keeps to in every mode of autograd: inference, frozen and changed weights, bf16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf import parallel_models
from tests.parallel import harness, layers
from torch import Tensor

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
