"""Layers and models of other kinds over ranks: what one process says, and how much less narrow rows send."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf.family import FAMILY
from tests.hf.parallel_models import SIZES, largest_errors, mine, tokens
from tests.parallel import harness
from tests.parallel.layers import layer_of

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.layer import moe_layers
from moesaic.parallel import traffic, use_strategy

RANKS = [2, pytest.param(3, marks=pytest.mark.slow)]
# One of each kind where many would only take longer: what ranks do with a bank is tested elsewhere.
QUICK = {"chain of all", "small, big or skip", "pre-gated stack", "recurrent"}


@pytest.mark.parametrize(
    ("ranks", "variant"),
    [
        pytest.param(ranks, variant, marks=[] if ranks == 2 and variant in QUICK else pytest.mark.slow)
        for ranks in (2, 3)
        for variant in FAMILY
    ],
)
def test_a_model_over_ranks(ranks: int, variant: str) -> None:
    for errors in harness.pool(ranks).run(compared, FAMILY[variant]):
        assert max(errors.values()) < 1e-5, errors


def compared(settings: Mapping[str, Any]) -> dict[str, float]:
    """Largest errors of logits and gradients, whatever travels; a balancing loss is of each rank's own tokens."""
    torch.manual_seed(0)
    sizes = {**SIZES, "moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8, "initializer_range": 0.2}
    model = moesaic.MoesaicForCausalLM(moesaic.MoesaicConfig(**{**sizes, **settings}))
    alone, batch = copy.deepcopy(model), tokens(2 * dist.get_world_size())
    expected = alone(batch).logits
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch.flatten()).backward()
    moesaic.parallelize(model)
    worst: dict[str, float] = {}
    for strategy in ("tokens", "weights", "hybrid"):
        model.zero_grad()
        with use_strategy(strategy):
            logits = model(mine(batch)).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine(batch).flatten()).backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for parameter in alone.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        errors = largest_errors(model, alone) | {"logits": float((logits - mine(expected)).detach().abs().max())}
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    decided = moe_layers(model)[0].last_decision
    assert decided is not None and decided.plan.strategy == "hybrid"
    return worst


@pytest.mark.parametrize("ranks", RANKS)
def test_counts_are_those_of_all_ranks(ranks: int) -> None:
    """What the balancers get of a chain with unequal experts: slots of each iteration, by expert, over all ranks."""
    for told, wanted in harness.pool(ranks).run(counted):
        assert told == wanted


def counted() -> tuple[list[list[int]], list[list[int]]]:
    settings = {"iterations": 2, "expert_d_ffs": [4, 4, 10, 10, 6, 6, 6, 6], "router": "sigmoid_topk"}
    layer = moesaic.parallelize(layer_of({**settings, "balancing": {"bias_update": 0.1}}).train())
    layer(torch.randn(9, 8, generator=torch.Generator().manual_seed(dist.get_rank())))
    own = torch.stack([routing.counts() for routing in layer.last_routings])
    dist.all_reduce(own)
    return [balancing.slot_counts.tolist() for balancing in layer.balancers], own.tolist()


@pytest.mark.parametrize("ranks", RANKS)
def test_only_narrow_rows_travel(ranks: int) -> None:
    for wide, narrow in harness.pool(ranks).run(sent):
        for kind in ("tokens", "results"):
            # With each row goes what it is, 8 bytes or none.
            assert 3.7 < wide[kind] / narrow[kind] <= 4.0, kind
        assert not narrow["weights"] and not narrow["gradients"]


def sent() -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a forward and a backward pass at full width, and of rows a quarter as wide, with the same routes."""
    told = []
    for width in (None, 32):
        torch.manual_seed(0)
        layer = MoE(MoEConfig(d_model=128, d_ff=24, num_experts=8, communication_width=width))
        with torch.no_grad():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(5))
        moesaic.parallelize(layer)
        x = torch.randn(40, 128, generator=torch.Generator().manual_seed(dist.get_rank()), requires_grad=True)
        with use_strategy("tokens", overlap=1):
            before = traffic()
            layer(x).sum().backward()
        told.append({kind: value - before[kind] for kind, value in traffic().items()})
    return told[0], told[1]
