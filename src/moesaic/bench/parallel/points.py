"""One point of the grid on the ranks: the choice in its steady state against all fixed plans, in turns."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from moesaic.bench.parallel.bench_layer import BenchLayer
from moesaic.bench.parallel.plans import fixed_plans
from moesaic.bench.parallel.turns import Step, race, take_turns
from moesaic.bench.parallel.work import Work
from moesaic.parallel.choice.candidates import exchanges
from moesaic.parallel.choice.cost import Pricing
from moesaic.parallel.plan import AUTO, STRATEGIES, Wish
from moesaic.parallel.setting import use_strategy

# The choice is in its steady state when it has explored nothing in so many steps.
_QUIET_STEPS = 3
_MOST_STEPS = 100


@lru_cache(maxsize=1)
def _layer(num_experts: int, top_k: int, d_model: int, d_ff: int) -> BenchLayer:
    return BenchLayer(Work(1, num_experts, top_k, d_model, d_ff))


def bench_layer(work: Work) -> BenchLayer:
    """The layer of a work's sizes, on all ranks; kept until one of other sizes is asked for."""
    layer = _layer(work.num_experts, work.top_k, work.d_model, work.d_ff)
    layer.set(work)
    return layer


def measure_point(work: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time every fixed plan and the choice.

    Returns:
        ``times``: seconds of each contender's steps. ``predicted``: what the cost model says of each fixed plan.
        ``chosen``: the plan that was last chosen. ``steps``: until the choice was in its steady state. ``error``: see
        :meth:`BenchLayer.error`.
    """
    layer = bench_layer(Work(**work))
    topology = layer.auto.topology
    rules = fixed_plans(layer.work.num_experts, topology.size, exchanges(topology, Wish()))
    steps = _settle(layer, layer.chosen)
    error = layer.error()
    times = race({AUTO: layer.chosen, **{name: layer.fixed(rule) for name, rule in rules.items()}}, seconds, (AUTO,))
    pricing = Pricing(layer.told.workload, layer.told.links, layer.told.compute, topology)
    before = pricing.compute.overhead.counts
    predicted = {
        name: before + pricing.estimate(rule.plan(layer.told.workload)).seconds for name, rule in rules.items()
    }
    decision = layer.auto.last_decision
    return {
        "work": work,
        "times": {name: each.seconds for name, each in times.items()},
        "predicted": predicted,
        "chosen": "" if decision is None else str(decision.plan),
        "steps": steps,
        "error": error,
    }


def measure_strategies(work: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of steps by each strategy that a user may name, whatever it leaves open chosen as always, in turns.

    Returns:
        ``times`` by strategy; ``chosen``, the plan that was last chosen for it.
    """
    layer = bench_layer(Work(**work))
    steps = {strategy: _by(layer, strategy) for strategy in (*STRATEGIES, AUTO)}
    for step in steps.values():
        _settle(layer, step)
    times = take_turns(steps, rounds)
    chosen = {}
    for strategy, step in steps.items():
        step()
        chosen[strategy] = str(layer.auto.last_decision.plan) if layer.auto.last_decision else ""
    return {"times": {name: list(each.seconds) for name, each in times.items()}, "chosen": chosen}


def _by(layer: BenchLayer, strategy: str) -> Step:
    def step() -> None:
        with use_strategy(strategy):
            layer.chosen()

    return step


def _settle(layer: BenchLayer, step: Step) -> int:
    quiet = steps = 0
    while quiet < _QUIET_STEPS and steps < _MOST_STEPS:
        step()
        decision = layer.auto.last_decision
        assert decision is not None
        quiet = 0 if decision.why == "exploring" else quiet + 1
        steps += 1
    return steps
