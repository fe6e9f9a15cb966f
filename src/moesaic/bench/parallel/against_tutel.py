"""The same layer by Tutel and by us, in turns in the same processes.

T tokens · D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moesaic.bench.parallel.turns import take_turns
from moesaic.bench.parallel.tutel import tutel_layer
from moesaic.bench.parallel.work import Work
from moesaic.config import MoEConfig
from moesaic.hf.parallelize import parallelize
from moesaic.layer import MoE

OURS, TUTEL = "moesaic", "Tutel"
_WARM_STEPS = 25


def measure_tutel(work: dict[str, Any], capacity_factor: float, hot: float, rounds: int) -> dict[str, Any]:
    """Seconds of both, and their errors against the layer on one process.

    Args:
        work: of each rank; the tokens go where the gate says, so ``routing`` means nothing.
        capacity_factor: of both; 0: no token is dropped.
        hot: added to the logit of one expert; 0: all are alike.
    """
    point, rank = Work(**work), distributed.get_rank()
    torch.manual_seed(0)
    config = MoEConfig(point.d_model, point.d_ff, point.num_experts, point.top_k, capacity_factor=capacity_factor)
    whole = MoE(config)
    whole.router.reset_parameters(std=point.d_model**-0.5)
    dice = torch.Generator().manual_seed(rank)
    x_TD, grad_TD = (torch.randn(point.tokens, point.d_model, generator=dice) for _ in range(2))
    if hot:  # a feature that is 1 in all tokens is a bias
        x_TD[:, 0] = 1.0
        with torch.no_grad():
            whole.router.weight[0, 0] += hot
    theirs = tutel_layer(whole, point, capacity_factor)
    ours = parallelize(copy.deepcopy(whole))
    runs = {name: _run(layer, x_TD, grad_TD, point.training) for name, layer in ((OURS, ours), (TUTEL, theirs))}
    reference = _run(whole, x_TD, grad_TD, point.training)()
    errors = {name: max(map(_error, run(), reference)) for name, run in runs.items()}
    for _ in range(_WARM_STEPS):
        runs[OURS]()
    times = take_turns(runs, rounds)
    decision = ours.last_decision
    return {
        "times": {name: list(each.seconds) for name, each in times.items()},
        "errors": errors,
        "chosen": str(decision.plan) if decision else "",
    }


def _run(layer: nn.Module, x_TD: Tensor, grad_TD: Tensor, training: bool) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        layer.zero_grad()
        if not training:
            with torch.no_grad():
                return [layer(x_TD)]
        leaf_TD = x_TD.clone().requires_grad_()
        y_TD = layer(leaf_TD)
        y_TD.backward(grad_TD)
        assert leaf_TD.grad is not None
        return [y_TD.detach(), leaf_TD.grad]

    return run


def _error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())
