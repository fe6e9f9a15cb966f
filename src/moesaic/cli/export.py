"""``moesaic export``: write our checkpoint in another one's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A model folder of moesaic, or the folder of a training run.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a plain Qwen3-MoE checkpoint, which transformers and other programs read without moesaic."""
    from moesaic.cli.output import print_json
    from moesaic.hf.export import export_folder

    folder = export_folder(model, out)
    if as_json:
        print_json({"format": "qwen3_moe", "folder": str(folder)})
    else:
        print(f"wrote a Qwen3-MoE checkpoint to {folder}")
