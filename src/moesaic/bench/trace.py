"""The tuner on mixed work: ``"auto"`` against the fixed backends, and against who knew the best one of each call."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moesaic.autotune.tuner import Tuner
from moesaic.bench.contenders import experts_module
from moesaic.bench.shapes import Shape
from moesaic.bench.timing import timed
from moesaic.bench.workload import Call, make_banks, route
from moesaic.experts import BACKENDS, Backend, available, use_backend
from moesaic.experts.backend import AUTO, tune_with
from moesaic.registry import Registry

SHAPE = Shape(32, 4, 1024, 512)
MOST_TOKENS = 4096
_CALLS = 40
_APART = 7
# The share of tokens whose first expert is one and the same.
_HOT = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Trace:
    """What a mixed trace took, in seconds for the whole of it.

    Attributes:
        shape: of the layer.
        tokens: of each call.
        rounds: how often the trace was run.
        fixed: each backend's median round.
        oracle: the median round of the backend that is the fastest for each call, by its median over the rounds.
        auto: the median round.
        first_ratio, ratio: auto's time over the oracle's in the first round, when nothing was known, and over all.
        overhead: what exploring and comparing lost, by the tuner's own account, as a share of the time.
        explored: calls that went to another candidate than the best.
    """

    shape: str
    tokens: list[int]
    rounds: int
    fixed: dict[str, float]
    oracle: float
    auto: float
    first_ratio: float
    ratio: float
    overhead: float
    explored: int


def run_trace(
    seconds: float, shape: Shape = SHAPE, most_tokens: int = MOST_TOKENS, calls: int = _CALLS, seed: int = 0
) -> Trace:
    """Run a trace of calls of 1 to ``most_tokens`` tokens, balanced to one hot expert, again and again.

    All fixed backends and ``"auto"`` take turns, each at another call of the trace, so that none finds weights in a
    cache that the one before it has read; in a round each of them computes each call once. The tuner is a new one that
    knows nothing, and remembers nothing afterwards; what it explores counts as its time.

    Args:
        seconds: how long to go on; three rounds at least.
        shape: of the layer, in bf16.
    """
    banks = make_banks(shape, torch.bfloat16, seed)
    modules = [experts_module(shape, bank, "moesaic") for bank in banks]
    work = _calls(shape, most_tokens, calls, len(banks), seed)
    names = [*available(), AUTO]
    tuner = Tuner(_available_only())
    before = tune_with(tuner.run)
    try:
        _warm(modules, work, names[:-1])
        times, dice = list[np.ndarray](), random.Random(seed)
        start = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - start < seconds:
            times.append(_round(modules, work, names, dice))
    finally:
        tune_with(before)
    return _summary(shape, [len(call.x) for call in work], names[:-1], np.array(times), tuner)


def _available_only() -> Registry[Backend]:
    registry: Registry[Backend] = Registry("backend")
    for name in available():
        registry.register(name)(BACKENDS.get(name))
    return registry


def _calls(shape: Shape, most_tokens: int, count: int, num_banks: int, seed: int) -> list[Call]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.logspace(0, np.log10(most_tokens), count).round().long()
    calls = []
    for i, number in enumerate(tokens[torch.randperm(count, generator=generator)].tolist()):
        x_TD = torch.randn(number, shape.d_model, generator=generator).bfloat16()
        weights_TK = torch.randn(number, shape.top_k, generator=generator).softmax(-1).bfloat16()
        calls.append(Call(x_TD, route(shape, number, _HOT[i % len(_HOT)], generator), weights_TK, i % num_banks))
    return calls


def _round(modules: list[nn.Module], calls: list[Call], names: list[str], dice: random.Random) -> np.ndarray:
    """``[calls, backends]`` seconds."""
    times_CB = np.empty((len(calls), len(names)))
    for step in range(len(calls)):
        for index, name in dice.sample(list(enumerate(names)), len(names)):
            at = (step + index * _APART) % len(calls)
            times_CB[at, index] = _seconds(modules, calls[at], name)
    return times_CB


def _warm(modules: list[nn.Module], calls: list[Call], names: list[str]) -> None:
    for name in names:
        for call in calls:
            _seconds(modules, call, name)


@torch.inference_mode()
def _seconds(modules: list[nn.Module], call: Call, name: str) -> float:
    with use_backend(name):
        return timed(lambda: modules[call.bank](call.x, call.ids, call.weights))


def _summary(shape: Shape, tokens: list[int], fixed: list[str], times_RCB: np.ndarray, tuner: Tuner) -> Trace:
    """``times``: rounds, calls, backends; ``"auto"`` is the last backend."""
    best_C = np.median(times_RCB[:, :, :-1], axis=0).argmin(axis=1)
    oracle_R = times_RCB[:, np.arange(len(tokens)), best_C].sum(axis=1)
    rounds_RB = times_RCB.sum(axis=1)
    auto_R = rounds_RB[:, -1]
    statistics = tuner.statistics()
    return Trace(
        str(shape),
        tokens,
        len(times_RCB),
        {name: float(np.median(rounds_RB[:, index])) for index, name in enumerate(fixed)},
        float(np.median(oracle_R)),
        float(np.median(auto_R)),
        float(auto_R[0] / oracle_R[0]),
        float(auto_R.sum() / oracle_R.sum()),
        statistics.overhead,
        statistics.explored,
    )
