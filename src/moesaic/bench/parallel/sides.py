"""A step's two sides alone: what computing takes without communication, and communication without computing.

N rows on their way · C columns · n experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from moesaic.bench.parallel.bench_layer import BenchLayer
from moesaic.bench.parallel.points import bench_layer
from moesaic.bench.parallel.turns import Step, take_turns
from moesaic.bench.parallel.work import Work, expert_ids
from moesaic.dispatch import Dispatch
from moesaic.experts import ExpertWeights, compute
from moesaic.parallel.choice.candidates import Candidate
from moesaic.parallel.exchange import EXCHANGES
from moesaic.parallel.plan import AUTO
from moesaic.parallel.schedule import Schedule

COMPUTE, COMMUNICATION = "compute alone", "communication alone"


def measure_overlap(work: dict[str, Any], overlaps: list[int], rounds: int) -> dict[str, list[float]]:
    """Seconds of steps that move tokens, by overlap; of the choice's; and of both sides alone, in turns."""
    layer = bench_layer(Work(**work))
    steps: dict[str, Step] = {str(overlap): layer.fixed(Candidate("tokens", overlap=overlap)) for overlap in overlaps}
    for step in steps.values():
        step()
    for _ in range(20):
        layer.chosen()
    steps[str(overlaps[0])]()  # leaves its workload
    steps |= {AUTO: layer.chosen, COMPUTE: _compute(layer), COMMUNICATION: _communicate(layer)}
    return {name: list(each.seconds) for name, each in take_turns(steps, rounds).items()}


def _compute(layer: BenchLayer) -> Callable[[], object]:
    """This rank's experts on as many rows as its step gives them."""
    work, experts = layer.work, layer.auto.layout.experts_of(layer.rank)
    owned = slice(experts.start, experts.stop)
    bank = layer.whole.experts
    up, down = (each.detach()[owned].clone().requires_grad_(work.training) for each in (bank.up, bank.down))
    ids = torch.cat([expert_ids(work, rank) for rank in range(layer.auto.topology.size)])
    mine = (ids >= experts.start) & (ids < experts.stop)
    ids_NK = torch.where(mine, ids - experts.start, len(experts))[mine.any(1)]
    x_ND = torch.randn(len(ids_NK), work.d_model, requires_grad=work.training)
    weights_NK = torch.rand(ids_NK.shape)
    grad_ND = torch.randn(x_ND.shape)

    def step() -> None:
        with torch.set_grad_enabled(work.training):
            dispatch = Dispatch.from_slots(ids_NK, weights_NK, len(experts))
            y_ND = compute(x_ND, dispatch, ExpertWeights(up, down, bank.activation))
        if work.training:
            y_ND.backward(grad_ND)
            x_ND.grad = up.grad = down.grad = None

    return step


def _communicate(layer: BenchLayer) -> Callable[[], object]:
    """The step's rows there and back, once, and for training once more the other way."""
    workload, topology = layer.told.workload, layer.auto.topology
    exchange = EXCHANGES.get("direct")
    sizes = exchange.sizes(topology, Schedule(layer.told.plan, workload).rows)
    home = sizes.turned()
    there = torch.zeros(int(sizes.sends_W.sum()), workload.row_bytes // 4)
    back = torch.zeros(int(sizes.receives_W.sum()), workload.result_bytes // 4)
    there_too = torch.zeros(len(there), workload.result_bytes // 4)
    back_too = torch.zeros(len(back), workload.row_bytes // 4)

    def step() -> None:
        exchange.start(topology, there, sizes, "tokens").wait()
        exchange.start(topology, back, home, "results").wait()
        if layer.work.training:
            exchange.start(topology, there_too, sizes, "tokens").wait()
            exchange.start(topology, back_too, home, "results").wait()

    return step


def measure_exchanges(sizes: list[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of an all-to-all with so many bytes from each rank to each, by size and by exchange."""
    topology = bench_layer(Work(1, distributed.get_world_size(), 1, 8, 8)).auto.topology
    names = [name for name in EXCHANGES if EXCHANGES.get(name).refusal(topology) is None]
    found = {}
    for size in sizes:
        rows_NC = torch.zeros(topology.size, size // 4)
        steps = {name: _exchange(name, topology, rows_NC) for name in names}
        take_turns(steps, 2)
        found[str(size)] = {name: list(each.seconds) for name, each in take_turns(steps, rounds).items()}
    return found


def _exchange(name: str, topology: Any, rows_NC: Tensor) -> Callable[[], object]:
    exchange = EXCHANGES.get(name)
    sizes = exchange.sizes(topology, lambda senders, receivers: np.ones((len(senders), len(receivers)), np.int64))
    return lambda: exchange.start(topology, rows_NC, sizes, "tokens").wait()
