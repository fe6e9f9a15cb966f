"""``moesaic finetune``: fine-tune a model into an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL [RECIPE.toml] [key=value ...]",
            help="The folder of the model or of the run that trained it, a recipe, and keys that differ from it, such "
            "as adapter.method=lora or train.steps=100.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", help="A file or folder of text, DOMAIN=PATH, or 'stdlib'; short for data.sources."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder, to be given as the adapter. Default: runs/NAME, as in train.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a model's experts (or low-rank parts, or all of it); stops and resumes as train does."""
    from moesaic.adapters.finetune import choose, finetune
    from moesaic.cli.output import print_json, print_table
    from moesaic.train.display import ConsoleDisplay
    from moesaic.train.voice import one_voice

    with one_voice():
        recipe, folder = choose(words or [], out, resume=resume, sources=data)
        result = finetune(recipe, folder, resume=resume, overwrite=overwrite, display=ConsoleDisplay())
    if as_json:
        print_json(result)
        return
    print_table(
        "Validation perplexity",
        ["domain", "before", "after", "tokens"],
        [
            [name, f"{result.before[name].perplexity:,.2f}", f"{after.perplexity:,.2f}", f"{after.tokens:,}"]
            for name, after in result.after.items()
        ],
    )
    share, size = result.trained_parameters / result.parameters, result.bytes / 1e6
    print(
        f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; "
        f"{result.trained_parameters:,} parameters trained ({share:.1%}); {size:.2f} MB in {result.adapter}"
    )
