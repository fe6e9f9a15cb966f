"""Scale on paper: the cost model on clusters by published figures. Nothing here is measured."""

from __future__ import annotations

from moesaic.bench.parallel.run import Run
from moesaic.bench.part import Part
from moesaic.parallel.choice.clusters import DEVICES, WIRES
from moesaic.parallel.choice.simulate import Cluster, Step, simulate

RANKS = tuple(2**power for power in range(4, 13))
_PER_HOST, _PER_RANK, _TOKENS, _TOP_K, _D_MODEL, _D_FF = 8, 2, 4096, 2, 2048, 2048
# Name -> Zipf's exponent, share of the tokens that want one certain expert.
ROUTINGS = {"uniform": (0.0, 0.0), "Zipf 1": (1.0, 0.0), "one expert for 10 % of the tokens": (0.0, 0.1)}
# Name -> device, link inside a host, link between hosts.
CLUSTERS = {
    "A100, HDR InfiniBand": ("a100", "nvlink3", "hdr"),
    "H100, NDR InfiniBand": ("h100", "nvlink4", "ndr"),
    "A100, 25 Gbit/s Ethernet": ("a100", "nvlink3", "ethernet25"),
}


def run_scale(run: Run) -> Part:
    """The speed-up of the choice over static expert parallelism, in training, by ranks, cluster and routing."""
    rows, points = [], []
    sweep = RANKS[:: 4 if run.quick else 1]
    for name, (device, inside, between) in CLUSTERS.items():
        for routing, (zipf, hot) in ROUTINGS.items():
            found = []
            for ranks in sweep:
                cluster = Cluster(ranks, _PER_HOST, WIRES[inside], WIRES[between], DEVICES[device])
                step = Step(_PER_RANK * ranks, _D_MODEL, _D_FF, _TOP_K, _TOKENS, zipf=zipf, hot=hot)
                simulated = simulate(cluster, step)
                speedup, strategy = simulated.speedup(simulated.auto), simulated.auto.plan.strategy
                found.append(speedup)
                told = {"cluster": name, "routing": routing, "ranks": ranks, "speedup": speedup, "strategy": strategy}
                points.append(told)
            run.tell(f"{name}, {routing}: {', '.join(f'{each:.2f}' for each in found)}")
            rows.append((name, routing, *(f"{each:.2f}x" for each in found)))
    work = f"{_PER_RANK} experts and {_TOKENS} tokens a rank, K{_TOP_K} D{_D_MODEL} F{_D_FF}, bf16, training"
    header = ("cluster", "routing", *(f"{ranks} ranks" for ranks in sweep))
    title = f"Simulated, not measured: speed-up over static expert parallelism, {work}"
    return Part(title, header, rows, [], points=points)
