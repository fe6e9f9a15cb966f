"""``moesaic train``: train a model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.toml] [key=value ...]",
            help="A recipe (default: the demo) and keys that differ from it, such as train.steps=100.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", help="A file or folder of text, DOMAIN=PATH, or 'stdlib'; short for data.sources."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: runs/NAME, by the name of the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a mixture-of-experts language model; SIGINT and SIGTERM finish the step, save, and exit with 130.

    Under torchrun (torchrun --nproc-per-node 4 -m moesaic train) all processes train one model together.
    """
    from moesaic.cli.output import print_json, print_table
    from moesaic.train.display import ConsoleDisplay
    from moesaic.train.recipe import Recipe
    from moesaic.train.run import choose, train
    from moesaic.train.voice import is_first, one_voice

    with one_voice():
        recipe, folder = choose(words or [], out, resume=resume, sources=data, kind=Recipe)
        result = train(recipe, folder, resume=resume, overwrite=overwrite, display=ConsoleDisplay())
    if not is_first():
        return
    if as_json:
        print_json(result)
        return
    print_table(
        "Validation perplexity",
        ["domain", "before", "after", "bits/byte after", "tokens"],
        [
            [
                name,
                f"{result.before[name].perplexity:,.2f}",
                f"{after.perplexity:,.2f}",
                f"{after.bits_per_byte:.3f}",
                f"{after.tokens:,}",
            ]
            for name, after in result.after.items()
        ],
    )
    print(f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; model in {result.model}")
