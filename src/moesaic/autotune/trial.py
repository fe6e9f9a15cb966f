"""Timing on purpose, before real calls come: all backends in turn, on random features."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moesaic.autotune.decision import Candidate
from moesaic.autotune.process import explain, tuner
from moesaic.autotune.signature import Signature, bucket_of_rows, family_of, spread_of
from moesaic.autotune.timings import ENOUGH
from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError
from moesaic.experts import Choice, ExpertWeights
from moesaic.routing import Routing


def learn(
    weights: ExpertWeights,
    tokens: Sequence[int],
    top_k: int,
    *,
    grad: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Choice]:
    """Time every backend that can run these experts, and remember it: from then on ``"auto"`` chooses by it.

    It is the only way by which choices for training change, because real calls are not experimented with where
    gradients are asked for.

    Args:
        weights: of the experts; ``bank.weights()``. Their ``grad`` is left alone.
        tokens: numbers of tokens, each timed with a balanced random routing.
        top_k: experts per token.
        grad: time forward and backward together, of features and of all weights that require gradients.
        dtype: of the features; that of the weights by default, bfloat16 where they are quantized.

    Returns:
        What is chosen now for each number of tokens, see :func:`explain`.

    Raises:
        ConfigError: for a number of tokens or a ``top_k`` that is out of range.
    """
    if not 1 <= top_k <= weights.num_experts:
        raise ConfigError(f"top_k is {top_k}: it must be between 1 and the number of experts, {weights.num_experts}")
    if any(number < 1 for number in tokens):
        raise ConfigError(f"tokens is {list(tokens)}: each number must be at least 1")
    generator = torch.Generator().manual_seed(0)
    float_dtype = dtype or (weights.up.dtype if weights.format is None else torch.bfloat16)
    met = []
    for number in tokens:
        x_TD = torch.randn(number, weights.d_model, generator=generator).to(weights.up.device, float_dtype)
        ids_TK = torch.rand(number, weights.num_experts, generator=generator).topk(top_k).indices
        ids_TK = ids_TK.to(x_TD.device)
        weights_TK = torch.full(ids_TK.shape, 1 / top_k, device=x_TD.device)
        routing = Routing(ids_TK, weights_TK, weights_TK.new_ones(number, weights.num_experts))
        met.append(_time(x_TD, Dispatch.from_routing(routing), weights, grad))
    tuner().forget_choices()
    tuner().save()
    return [choice for choice in explain() if choice.signature in met]


def _time(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights, grad: bool) -> Signature:
    rows = dispatch.permutation.shape[0]
    active, spread, hot = spread_of(dispatch.counts.tolist(), rows)
    if x_TD.device.type != "cpu":  # as much as a real call there can know
        active, spread, hot = min(rows, weights.num_experts), 0, False
    signature = Signature(family_of(x_TD, weights, grad), bucket_of_rows(rows), spread, hot)
    candidates = tuner().candidates(signature, x_TD, weights)
    for turn in range(1 + ENOUGH):
        for candidate in candidates:
            seconds = _seconds(x_TD.device, _work(candidate, x_TD, dispatch, weights, grad))
            if turn:  # what is generated or compiled at a first call is over
                candidate.samples.note(seconds / candidate.cost.seconds(rows, active))
    return signature


def _work(
    candidate: Candidate, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights, grad: bool
) -> Callable[[], object]:
    if not grad:

        def forward() -> object:
            with torch.no_grad():
                return candidate.backend.run(x_TD, dispatch, weights)

        return forward

    def forward_and_backward() -> object:
        with torch.enable_grad():
            x = x_TD.detach().requires_grad_()
            learned = [tensor for tensor in weights.tensors().values() if tensor.requires_grad]
            y_TD = candidate.backend.run(x, dispatch, weights)
            return torch.autograd.grad(y_TD.sum(), [x, *learned])

    return forward_and_backward


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
