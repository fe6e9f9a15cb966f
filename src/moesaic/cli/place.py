"""``moesaic place``: experts that follow each other often, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# A gain below this share of what was there is little.
_LITTLE = 0.02


def command(
    model: Annotated[Path, typer.Argument(help="A model folder, or the folder of a training run.")],
    trace: Annotated[
        Path,
        typer.Option(help="The routing trace of this model: trace.npz of a report of moesaic inspect, or its folder."),
    ],
    ranks: Annotated[int, typer.Option(help="How many ranks the experts will be spread over; at most the experts.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write the placed model to; it must not exist yet. Without: only the report."),
    ] = None,
    hosts: Annotated[
        int, typer.Option(help="Hosts with equally many ranks each: experts are placed on hosts first.")
    ] = 1,
    objective: Annotated[
        str,
        typer.Option(help="'transitions' between layers that stay on a rank (ExFlow), or 'rows' that moesaic sends."),
    ] = "transitions",
    seconds: Annotated[float, typer.Option(help="About the most that the solution may take.")] = 60.0,
    imbalance: Annotated[
        float, typer.Option(help="The most slots of a rank in a layer, over an even share, where that is possible.")
    ] = 1.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: the folder and the report.")] = False,
) -> None:
    """Place experts on ranks by what a trace says of them, and say what crosses ranks before and after.

    The placed model computes the same; only the order of its experts is another.
    """
    from moesaic.cli.output import print_json, print_table
    from moesaic.inspect.placement import place_folder

    placed = place_folder(
        model, trace, ranks, out=out, hosts=hosts, seconds=seconds, max_imbalance=imbalance, objective=objective
    )
    report = placed.report
    if as_json:
        print_json({"folder": placed.folder, **report})
        return
    title = f"held-out text ({report['tokens']['held_out']} tokens), before → after"
    header = ["layer", "crossing", *(["between hosts"] if hosts > 1 else []), "rows", "imbalance"]
    print_table(title, header, _rows(report), whole=True)
    print(
        f"the limit of the imbalance, {imbalance:g}, holds on the text optimized on where it can; here it may be above"
    )
    if little := _little(report):
        print(little)
    for program in report["programs"]:
        print(_told(program))
    if placed.folder:
        print(f"wrote the placed model to {placed.folder}")
    else:
        print("nothing written: --out FOLDER writes the placed model")


def _little(report: dict[str, Any]) -> str | None:
    """Where what was minimized hardly became less on held-out text: a line that says so."""
    name = "crossing" if report["objective"] == "transitions" else "rows"
    before, after = report["before"][name], report["after"][name]
    if before is None or before - after >= _LITTLE * before:
        return None
    return (
        f"little is gained: {name} on held-out text changes by {(after - before) / before if before else 0.0:+.1%}; "
        "the model has little affinity, or the trace too little text"
    )


def _rows(report: dict[str, Any]) -> list[list[str]]:
    """A row of the table for each layer, and one for all."""
    lines = [(str(layer["number"]), layer["before"], layer["after"]) for layer in report["layers"]]
    shown = ["crossing", *(["host_crossing"] if report["hosts"] > 1 else [])]
    return [
        [
            name,
            *(_change(before[key], after[key], "{:.1%}") for key in shown),
            _change(before["rows"], after["rows"], "{:.2f}"),
            _change(before["imbalance"], after["imbalance"], "{:.2f}"),
        ]
        for name, before, after in [*lines, ("all", report["before"], report["after"])]
    ]


def _change(before: float | None, after: float | None, form: str) -> str:
    return "" if before is None or after is None else f"{form.format(before)} → {form.format(after)}"


def _told(program: dict[str, Any]) -> str:
    """What was found, and what is proved of it, in one line."""
    form, what = "{:.2f}", "ranks a token and layer"
    if program["objective"] == "transitions":
        form, what = "{:.1%}", "of the transitions stay"
    value, bound, gap = (form.format(program[key]) for key in ("value", "bound", "gap"))
    found = f"{program['name']}: {value} {what} (of the text optimized on)"
    if program["is_optimal"]:
        return f"{found}; HiGHS proves that this is the best"
    why = "not settled within the time" if program["exact"] else "too large to be solved exactly"
    return f"{found}; {why}: none is better than {bound}, a gap of {gap}"
