"""Affinity placement of a trace and of made-up ones: ``python benchmarks/placement.py [--trace TRACE] [--seconds 60]``.

Prints the tables of docs/parallelism.md as Markdown: what crosses ranks before and after, by both objectives, on tokens
that were not optimized on; and how far HiGHS gets with the program of ExFlow at several sizes. All of it takes some
minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesaic.inspect import RoutingTrace
from moesaic.inspect.placement import held_out_tokens
from moesaic.parallel.placement.place import OBJECTIVES, LayerRouting, Placement, place, traffic

# Experts, layers, experts a token, ranks.
OLMOE = (64, 16, 8, 8)
SIZES = [(16, 4, 2, 2), (16, 4, 2, 4), (32, 4, 2, 4), OLMOE]
DEMO_RANKS = (2, 4)
TOKENS = 16_000


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="trace.npz of a report of moesaic inspect")
    parser.add_argument("--seconds", type=float, default=60.0, help="the limit of each solution")
    arguments = parser.parse_args()
    traced: list[LayerRouting] = []
    if arguments.trace:
        trace = RoutingTrace.load(arguments.trace)
        held_out = held_out_tokens(trace)
        traced = [LayerRouting(layer.expert_ids, layer.num_experts) for layer in trace.layers]
    print("| | crossing | rows a token and layer | busiest rank |\n|---|---|---|---|")
    for ranks in DEMO_RANKS if traced else ():
        print_savings(f"trace, {ranks} ranks", parted(traced, ~held_out), parted(traced, held_out), ranks, arguments)
    made_up = topics(*OLMOE)
    first = np.arange(TOKENS) < TOKENS * 3 // 4
    print_savings("OLMoE's shape", parted(made_up, first), parted(made_up, ~first), OLMOE[3], arguments)
    print("\n| experts × layers, ranks | seconds | stay | at most | |\n|---|---|---|---|---|")
    for ranks in DEMO_RANKS if traced else ():
        print_proof("trace", parted(traced, ~held_out), ranks, arguments)
    for num_experts, layers, top_k, ranks in SIZES:
        routing = parted(topics(num_experts, layers, top_k, ranks), first)
        print_proof(f"{num_experts} × {layers}", routing, ranks, arguments)


def topics(num_experts: int, layers: int, top_k: int, ranks: int) -> list[LayerRouting]:
    """Tokens of three topics a rank, each of which prefers some experts of every layer; some experts are popular."""
    random = np.random.default_rng(0)
    topic = random.integers(3 * ranks, size=TOKENS)
    routing = []
    for _ in range(layers):
        scores = random.normal(size=(3 * ranks, num_experts))[topic] * 1.5 + random.normal(size=num_experts) * 0.4
        scores += random.gumbel(size=scores.shape)
        ids = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
        routing.append(LayerRouting(ids.astype(np.int64), num_experts))
    return routing


def parted(routing: Sequence[LayerRouting], tokens: np.ndarray) -> list[LayerRouting]:
    """The routing of some tokens."""
    return [LayerRouting(layer.expert_ids[tokens], layer.num_experts) for layer in routing]


def print_savings(
    name: str,
    optimized: Sequence[LayerRouting],
    measured: Sequence[LayerRouting],
    ranks: int,
    arguments: argparse.Namespace,
) -> None:
    """A row for the experts as they are, and one for each objective."""
    placements = {f"{name}: as it is": Placement.contiguous(measured, ranks)}
    for objective in OBJECTIVES:
        solution = place(optimized, ranks, seconds=arguments.seconds, objective=objective)
        placements[f"`{objective}`"] = solution.placement
    for row, placement in placements.items():
        layers = traffic(measured, placement)
        crossing = np.mean([layer.crossing for layer in layers if layer.crossing is not None])
        rows = np.mean([layer.rows for layer in layers])
        print(f"| {row} | {crossing:.1%} | {rows:.2f} | {max(layer.imbalance for layer in layers):.2f} |", flush=True)


def print_proof(name: str, routing: Sequence[LayerRouting], ranks: int, arguments: argparse.Namespace) -> None:
    """A row of what the solution found and proved."""
    solution = place(routing, ranks, seconds=arguments.seconds)
    (stage,) = solution.stages
    told = "proved the best" if stage.is_optimal else "not settled" if stage.exact else "too large"
    print(
        f"| {name}, {ranks} ranks | {solution.seconds:.0f} | {stage.value:.1%} | {stage.bound:.1%} | {told} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
