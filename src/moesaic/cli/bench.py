"""``moesaic bench``: expert layers side by side, and what the tuner decided."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.bench import Plan, Row


def command(
    what: Annotated[str, typer.Argument(help="'experts' measures; 'explain' shows the tuner's decisions.")] = "experts",
    shape: Annotated[str, typer.Option(help="A, B, C, or sizes such as E64K8D2048F1024; several with commas.")] = "A",
    tokens: Annotated[str, typer.Option(help="Tokens a call; several with commas.")] = "1,4,16,64,512",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp16; several with commas.")] = "bf16",
    routing: Annotated[
        str, typer.Option(help="'balanced', 'hot' (one expert gets every token), or both.")
    ] = "balanced",
    backends: Annotated[
        str | None,
        typer.Option(
            help="Ours, as NAME, NAME+int8, +int4 or +frozen; times are over the first. Default: all that run here."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="grouped_mm, eager, batched_mm, vllm, llama.cpp. Default: the first two and the peers here."),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Forward and backward, instead of forward only.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="About how long one row may take.")] = 6.0,
    out: Annotated[Path | None, typer.Option(help="Write experts.json and roofline.png into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="The same as 'moesaic bench explain'.")] = False,
) -> None:
    """Measure expert layers side by side, alternating in one process, with the error of each beside its speed.

    Without options: five rows of about 6 seconds, each after making its weights (0.8 GB): about a minute in all.
    """
    from moesaic.errors import UsageError, did_you_mean

    if explain or what == "explain":
        _explain(as_json)
        return
    if what != "experts":
        raise UsageError(f"unknown benchmark {what!r}: {did_you_mean(what, ['experts', 'explain'])}")
    from moesaic.bench.report import document, make_folder
    from moesaic.cli.output import print_json

    plan, absent = _plan(shape, tokens, dtype, routing, backends, against, seconds, backward)
    if out is not None:
        make_folder(out)
    for name, reason in absent.items():
        print(f"{name} does not take part: {reason}", file=sys.stderr)
    rows = _measure(plan, out, as_json)
    if as_json:
        print_json(document(rows))


def _plan(
    shape: str,
    tokens: str,
    dtype: str,
    routing: str,
    backends: str | None,
    against: str | None,
    seconds: float,
    backward: bool,
) -> tuple[Plan, dict[str, str]]:
    from moesaic.bench import Plan, Workload, parse_shape
    from moesaic.bench.field import others, our_backends
    from moesaic.errors import UsageError

    for name, text in (
        ("shape", shape),
        ("tokens", tokens),
        ("dtype", dtype),
        ("routing", routing),
        ("backends", backends),
    ):
        if text is not None and not _split(text):
            raise UsageError(f"--{name} is empty: name at least one, several with commas")
    counts = _split(tokens)
    if wrong := [count for count in counts if not count.isdigit()]:
        raise UsageError(f"--tokens {tokens}: {wrong[0]!r} is not a number of tokens, such as 1 or 1,16,512")
    if not 0 < seconds <= 3600:
        raise UsageError(f"--seconds is {seconds}: it must be above 0, and 3600 at most")
    works = [
        Workload(parse_shape(each), int(count), kind, way, backward)
        for each in _split(shape)
        for kind in _split(dtype)
        for way in _split(routing)
        for count in counts
    ]
    ours = our_backends(_split(backends) if backends is not None else None)
    named, absent = others(_split(against) if against is not None else None)
    return Plan(works, ours, named, seconds), absent


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _measure(plan: Plan, out: Path | None, quiet: bool) -> list[Row]:
    """Print each row when it is measured, and write what there is after each, so that an interruption loses nothing."""
    from moesaic.bench import measure
    from moesaic.bench.report import HEADER, cells, document, notes, title, write
    from moesaic.bench.roofline import write_roofline
    from moesaic.cli.output import print_table

    rows: list[Row] = []
    for row in measure(plan, tell=lambda line: print(line, file=sys.stderr)):
        rows.append(row)
        if not quiet:
            print_table(title(row), HEADER, [cells(row, result) for result in row.results])
        for line in notes(row):
            print(line, file=sys.stderr)
        if out is not None:
            write(document(rows), out / "experts.json")
            write_roofline(rows, out / "roofline.png")
    return rows


def _explain(as_json: bool) -> None:
    """Every kind of call that the tuner knows on this machine, with what it would choose now and why."""
    from moesaic import autotune
    from moesaic.bench.report import milliseconds
    from moesaic.cli.output import print_json, print_table

    choices, told = autotune.explain(), autotune.statistics()
    if as_json:
        print_json(
            {
                "choices": [{**vars(choice), "text": str(choice.signature)} for choice in choices],
                "file": told.file,
                "problem": told.problem,
            }
        )
        return
    rows = [
        (
            str(choice.signature),
            f"{choice.backend} ({choice.why})",
            ", ".join(f"{each.backend} {milliseconds(each.seconds)} ms ({each.source})" for each in choice.estimates),
        )
        for choice in choices
    ]
    print_table("What 'auto' chooses", ["calls", "backend (by)", "expected for a typical call"], rows)
    print(f"kinds of calls known: {len(choices)}" + (f"; timings are kept in {told.file}" if told.file else ""))
    if told.problem:
        print(told.problem, file=sys.stderr)
