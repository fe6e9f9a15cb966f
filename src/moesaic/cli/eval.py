"""``moesaic eval``: perplexity on text, by domain."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A model folder, or the folder of a training run.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A file or folder of text, DOMAIN=PATH, or 'stdlib'. Default: the run's own data, else 'stdlib'.",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="validation: the held-out part; all: everything. Default: all for --data PATH, else validation."
        ),
    ] = "",
    sequence_length: Annotated[
        int, typer.Option(help="Tokens a window; 0: those of the run, else what fits, up to 1024.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens a domain; 0 for all.")] = 0,
    adapter: Annotated[
        str, typer.Option(help="An adapter of the model, to be measured with it: its folder, or that of its run.")
    ] = "",
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for autocast.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the perplexity of our model, or of any causal language model of transformers on disk."""
    from moesaic.cli.output import print_json, print_table
    from moesaic.train.describe import skipped_line
    from moesaic.train.evaluate import evaluate_folder

    adapted = None
    if adapter:
        from moesaic.adapters.merging import load_adapted

        adapted, _ = load_adapted(model, adapter)
    report = evaluate_folder(
        model,
        sources=data,
        split=split or None,
        sequence_length=sequence_length or None,
        max_tokens=max_tokens or None,
        batch_size=batch_size,
        precision=precision,
        model=adapted,
    )
    if report.skipped:
        print(skipped_line(report.skipped), file=sys.stderr)
    if report.text_changed:
        print(f"warning: the text has changed since {model} was trained on it", file=sys.stderr)
    if report.not_causal:
        print(f"warning: the figures are not those of a model that writes text: {report.not_causal}", file=sys.stderr)
    if as_json:
        print_json(report)
        return
    print_table(
        f"{' with '.join(filter(None, [report.model, adapter]))}: {report.split} text, "
        f"{report.sequence_length} tokens a window",
        ["domain", "tokens", "loss (nats/token)", "perplexity", "bits/byte"],
        [
            [name, f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.perplexity:.2f}", f"{r.bits_per_byte:.3f}"]
            for name, r in report.domains.items()
        ],
    )
