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

    from moesaic.cli.output import print_json
    from moesaic.hf.load import load_model
    from moesaic.inspect import check_out, collect, read_documents, write_report
    from moesaic.train.folder import NOTE, RunFolder
    from moesaic.train.recipe_file import recorded_recipe

    name = model.resolve().name
    is_run = (model / NOTE).is_file()
    folder = check_out(out or (model / "report" if is_run else Path(f"{name}-report")))
    loaded, tokenizer = load_model(model)
    settings = recorded_recipe(RunFolder(model).read()["recipe"], str(model / NOTE)).data if is_run else None
    held_out = settings.validation_fraction if settings else 0.05
    corpus = read_documents(
        data or (settings.sources if settings else ["stdlib"]), held_out if data in (None, [], ["stdlib"]) else None
    )
    for skipped in corpus.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokens", total=None)
        trace = collect(
            loaded,
            tokenizer,
            corpus.documents,
            name=name,
            max_tokens=tokens,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    report = write_report(trace, folder)
    if as_json:
        print_json({"folder": folder, "files": sorted(path.name for path in folder.iterdir()), "report": report})
        return
    for finding in report["findings"]:
        print(f"{finding['title']}: {finding['text']}")
    print(f"\nwrote the report to {folder / 'index.html'}")
