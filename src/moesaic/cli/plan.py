"""``moesaic plan``: what each strategy should take on a cluster on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesaic.parallel.choice.cost import PlanEstimate
    from moesaic.parallel.choice.simulate import Simulated

# A plan's experts are many on a large cluster.
_MOST_FETCHED = 16
_RANKS = 2048


def command(
    ranks: Annotated[
        int | None, typer.Option(help="Ranks, each with a device of its own; at most 4096.", show_default="2048")
    ] = None,
    per_host: Annotated[int, typer.Option(help="Ranks on one host.")] = 8,
    link: Annotated[
        str,
        typer.Option(
            help="Between hosts: hdr, ndr (InfiniBand), ethernet100, ethernet25, ethernet10, or figures of a rank one "
            "way such as 25GB/s,3us or 200Gbit/s,3us."
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
    from moesaic.errors import ConfigError
    from moesaic.parallel.choice import clusters
    from moesaic.parallel.choice.simulate import Cluster, Step, simulate

    wires, chip, stored = (clusters.wire(inside), clusters.wire(link)), clusters.device(device), _dtype(dtype)
    if sweep and ranks is not None:
        raise ConfigError("--sweep says the ranks: leave --ranks out")
    cases = []
    for number in _sizes(sweep) if sweep else [_RANKS if ranks is None else ranks]:
        cluster = Cluster(number, per_host, *wires, chip, efficiency)
        count = experts or 2 * number
        cases.append((cluster, Step(count, d_model, d_ff, top_k, tokens, stored, zipf, hot, grad=not forward)))
    points = [simulate(*case, seed) for case in cases]
    if as_json:
        sources = {"inside": wires[0].source, "between": wires[1].source, "device": chip.source}
        print_json({"sources": sources, "points": [_document(each) for each in points]})
    elif sweep:
        _print_sweep(points)
    else:
        _print_point(points[0])
    if not as_json:
        print(f"\nnothing of this is measured. Inside a host: {wires[0].source}")
        print(f"Between hosts: {wires[1].source}")
        print(f"Device: {chip.source}")


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
        parts = [_millis(seconds) for seconds in (counts, *estimate.parts.values())]
        rows.append([name, _millis(estimate.seconds + counts), f"{speedup:.2f}", *parts])
    header = ["", "step", "speed-up", "counts", *PARTS]
    kept = [index for index in range(len(header)) if any(row[index] != _millis(0.0) for row in rows)]
    work = "training" if step.grad else "forward"
    print_table(
        f"{cluster.ranks} ranks, {cluster.per_host} a host; E{step.num_experts} K{step.top_k} D{step.d_model} "
        f"F{step.d_ff}, {step.tokens} tokens a rank, {work}\nmilliseconds, parts as if nothing overlapped",
        [header[index] for index in kept],
        [[row[index] for index in kept] for row in rows],
        whole=True,
    )
    _print_plans("plans", {name: str(estimate.plan) for name, estimate in _named(point)})


def _print_sweep(points: list[Simulated]) -> None:
    from moesaic.cli.output import print_table

    rows = []
    for point in points:
        others = [_millis(estimate.seconds + point.counts) for estimate in point.best.values()]
        told = [_millis(point.auto.seconds + point.counts), f"{point.speedup(point.auto):.2f}"]
        rows.append([str(point.cluster.ranks), _millis(point.static.seconds), *others, *told])
    header = ["ranks", "static", *points[0].best, "auto", "speed-up"]
    print_table("milliseconds of one step of one layer", header, rows, whole=True)
    _print_plans("auto's plans", {str(point.cluster.ranks): str(point.auto.plan) for point in points})


def _print_plans(title: str, plans: dict[str, str]) -> None:
    print(f"\n{title}")
    width = max(map(len, plans))
    for name, plan in plans.items():
        print(f" {name:{width}}  {plan}")


def _millis(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
