"""``moesaic inspect``: a report of how a model routes text to its experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[Path, typer.Argument(help="A model folder, or the folder of a training run.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A file or folder of text, DOMAIN=PATH, or 'stdlib'. Default: what the run was trained on, else "
            "'stdlib'; of these only what training holds out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write. Default: report in the run's folder, else NAME-report here."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to run, evenly from all domains.")] = 16384,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: the folder, its files, the report.")
    ] = False,
) -> None:
    """Run text through our model, or any MoE of transformers on disk, and write a report of its routing."""
    from rich.console import Console
    from rich.progress import Progress

    from moesaic.cli.output import print_json, print_table
    from moesaic.inspect import inspect_folder, spending_table

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokens", total=None)
        done = inspect_folder(
            model,
            sources=data,
            out=out,
            max_tokens=tokens,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for skipped in done.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    if as_json:
        files = sorted(path.name for path in done.folder.iterdir())
        print_json({"folder": done.folder, "files": files, "report": done.report})
        return
    for finding in done.report["findings"]:
        print(f"{finding['title']}: {finding['text']}")
    if done.report["experts_per_token"]["varies"]:
        print()
        print_table("Experts per token", *spending_table(done.report))
    print(f"\nwrote the report to {done.folder / 'index.html'}")
