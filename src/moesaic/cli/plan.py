"""``moesaic plan``: what each strategy should take on a cluster on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesaic.parallel.choice.cost import PlanEstimate
    from moesaic.parallel.choice.simulate import Simulated

# A plan's experts are many on a large cluster.
_MOST_FETCHED = 16


def command(
    ranks: Annotated[int, typer.Option(help="Ranks, each with a device of its own.")] = 2048,
    per_host: Annotated[int, typer.Option(help="Ranks on one host.")] = 8,
    link: Annotated[
        str,
        typer.Option(
            help="Between hosts: hdr, ndr (InfiniBand), ethernet100, ethernet25, ethernet10, or figures of a rank one "
            "way such as 25GB/s,3us."
        ),
    ] = "hdr",
    inside: Annotated[str, typer.Option(help="Inside a host: nvlink3, nvlink4, or figures as for --link.")] = "nvlink3",
    device: Annotated[str, typer.Option(help="a100, h100, or figures such as 312TFLOP/s,2039GB/s.")] = "a100",
    efficiency: Annotated[float, typer.Option(help="Share of the peak that matrix products reach.")] = 0.5,
    experts: Annotated[int, typer.Option(help="Experts of the layer. 0: two a rank.")] = 0,
    d_model: Annotated[int, typer.Option(help="Model width.")] = 2048,
    d_ff: Annotated[int, typer.Option(help="Hidden width of an expert (gated: three matrices).")] = 2048,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of features and weights: bf16, fp16 or fp32.")] = "bf16",
    zipf: Annotated[float, typer.Option(help="The i-th most popular expert is chosen in proportion to 1/i^zipf.")] = 0,
    hot: Annotated[float, typer.Option(help="Share of all tokens that choose one certain expert.")] = 0.0,
    forward: Annotated[bool, typer.Option("--forward", help="Forward only, instead of training.")] = False,
    sweep: Annotated[str, typer.Option(help="FIRST..LAST: for every doubling of the ranks, such as 16..4096.")] = "",
    seed: Annotated[int, typer.Option(help="Of the routing.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate one layer's step on a cluster on paper: static expert parallelism, each strategy, and auto's choice."""
    from moesaic.cli.output import print_json
    from moesaic.parallel.choice import clusters
    from moesaic.parallel.choice.simulate import Cluster, Step, simulate

    wires, chip, stored = (clusters.wire(inside), clusters.wire(link)), clusters.device(device), _dtype(dtype)
    points = []
    for number in _sizes(sweep) if sweep else [ranks]:
        cluster = Cluster(number, per_host, *wires, chip, efficiency)
        count = experts or 2 * number
        step = Step(count, d_model, d_ff, top_k, tokens, stored, zipf, hot, grad=not forward)
        points.append(simulate(cluster, step, seed))
    if as_json:
        sources = {"inside": wires[0].source, "between": wires[1].source, "device": chip.source}
        print_json({"sources": sources, "points": [_document(each) for each in points]})
    elif sweep:
        _print_sweep(points)
    else:
        _print_point(points[0])
    if not as_json:
        print(f"\nsimulated: links {wires[0].source}; {wires[1].source}; device {chip.source}")


def _sizes(sweep: str) -> list[int]:
    from moesaic.errors import ConfigError

    first, dots, last = sweep.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--sweep is {sweep!r}: it must be FIRST..LAST, such as 16..4096")
    sizes = [int(first)]
    while 2 * sizes[-1] <= int(last):
        sizes.append(2 * sizes[-1])
    return sizes


def _dtype(name: str) -> Any:
    import torch

    from moesaic.errors import ConfigError, did_you_mean

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in dtypes:
        raise ConfigError(f"unknown dtype {name!r}: {did_you_mean(name, dtypes)}")
    return dtypes[name]


def _named(point: Simulated) -> list[tuple[str, PlanEstimate]]:
    return [("static", point.static), *point.best.items(), ("auto", point.auto)]


def _plan(estimate: PlanEstimate) -> dict[str, Any]:
    plan = {**vars(estimate.plan), "fetched": len(estimate.plan.fetched)}
    if len(estimate.plan.fetched) <= _MOST_FETCHED:
        plan["experts"] = estimate.plan.fetched
    return plan


def _document(point: Simulated) -> dict[str, Any]:
    told = {
        name: {
            "plan": _plan(estimate),
            "seconds": estimate.seconds + (0.0 if name == "static" else point.counts),
            "forward": estimate.forward,
            "backward": estimate.backward,
            "parts": estimate.parts,
            "speedup": 1.0 if name == "static" else point.speedup(estimate),
        }
        for name, estimate in _named(point)
    }
    return {"ranks": point.cluster.ranks, "experts": point.step.num_experts, "counts": point.counts, "estimates": told}


def _print_point(point: Simulated) -> None:
    from moesaic.cli.output import print_table
    from moesaic.parallel.choice.cost import PARTS

    step, cluster = point.step, point.cluster
    rows = []
    for name, estimate in _named(point):
        is_static = name == "static"
        counts = 0.0 if is_static else point.counts
        speedup = 1.0 if is_static else point.speedup(estimate)
        parts = [f"{1e3 * seconds:.2f}" for seconds in (counts, *estimate.parts.values())]
        rows.append([name, f"{1e3 * (estimate.seconds + counts):.2f}", f"{speedup:.2f}", *parts, str(estimate.plan)])
    work = "training" if step.grad else "forward"
    print_table(
        f"{cluster.ranks} ranks, {cluster.per_host} a host; E{step.num_experts} K{step.top_k} D{step.d_model} "
        f"F{step.d_ff}, {step.tokens} tokens a rank, {work}; milliseconds, parts as if nothing overlapped",
        ["", "step", "speed-up", "counts", *PARTS, "plan"],
        rows,
    )


def _print_sweep(points: list[Simulated]) -> None:
    from moesaic.cli.output import print_table

    rows = []
    for point in points:
        others = [f"{1e3 * (estimate.seconds + point.counts):.2f}" for estimate in point.best.values()]
        auto = point.auto
        told = [f"{1e3 * (auto.seconds + point.counts):.2f}", f"{point.speedup(auto):.2f}", str(auto.plan)]
        rows.append([str(point.cluster.ranks), f"{1e3 * point.static.seconds:.2f}", *others, *told])
    header = ["ranks", "static", *points[0].best, "auto", "speed-up", "auto's plan"]
    print_table("milliseconds of one step of one layer", header, rows)
