"""``moesaic quantize``: write a model with its experts in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A model folder, or the folder of a training run.")],
    to: Annotated[str, typer.Option(help="int8 or int4.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    group: Annotated[int, typer.Option(help="Inputs per scale of int4: 32, or 64, the default.")] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="Measure the perplexity before and after on a file or folder of text, DOMAIN=PATH, or 'stdlib'.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model with its experts in 8 or 4 bits, for our models and those of transformers."""
    from moesaic.cli.output import print_json, print_table
    from moesaic.train.quantized import quantize_folder

    made = quantize_folder(model, out, to, group=group or None, sources=data)
    rise = made.rise()
    if as_json:
        print_json({**vars(made), "rise": rise})
        return
    print(f"wrote {made.folder}: {made.bytes_before / 1e6:.1f} MB became {made.bytes_after / 1e6:.1f} MB")
    if made.before and made.after:
        after = made.after.domains
        print_table(
            f"perplexity, {made.before.split} text",
            ["domain", "before", to, "rise"],
            [
                [name, f"{r.perplexity:.3f}", f"{after[name].perplexity:.3f}", f"{rise[name]:.2%}"]
                for name, r in made.before.domains.items()
            ],
        )
