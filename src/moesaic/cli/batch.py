"""``moesaic batch``: a file of requests, computed offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def command(
    file: Annotated[Path, typer.Argument(help="Requests, one a line: OpenAI's batch format, or {'prompt': ...}.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder, or the folder of a training run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Results are appended; those that are there are kept.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter to load; may be given several times.")
    ] = None,
    name: Annotated[str, typer.Option(help="What requests call the base model. Default: the folder's name.")] = "",
    seed: Annotated[int, typer.Option(help="Of requests that say none: each has its own, by this one.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16. Default: as saved.")] = "",
    kv_gib: Annotated[
        float | None,
        typer.Option(min=0.001, help="Size of the KV cache.", show_default="at most a quarter of the free memory"),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 64,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 512,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and output.", show_default="the model's limit")
    ] = None,
    isolate: Annotated[
        bool | None,
        typer.Option(
            "--isolate/--no-isolate",
            help="Make a request's tokens independent of its batch, bit for bit.",
            show_default="where the model computes in fp32 on a CPU",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: what came of it.")] = False,
) -> None:
    """Compute a file of requests; SIGINT and SIGTERM stop it, and the same command goes on."""
    from moesaic.errors import UsageError, did_you_mean
    from moesaic.serve.names import default_name, parse_adapters
    from moesaic.serve.request import EngineSettings

    if dtype and dtype not in _DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}: {did_you_mean(dtype, _DTYPES)}")
    base = name or default_name(model)
    adapters = parse_adapters(adapter or [], base)

    import torch

    from moesaic.cli.output import print_json
    from moesaic.cli.progress import batch_progress
    from moesaic.hf.load import model_folder
    from moesaic.serve.offline import Batch, run_batch

    kv_bytes = None if kv_gib is None else int(kv_gib * 2**30)
    settings = EngineSettings(16, kv_bytes, max_batch, token_budget, max_context, isolate=isolate)
    weights = getattr(torch, _DTYPES[dtype]) if dtype else None
    batch = Batch(file, out, model_folder(model), base, adapters, settings, weights, seed)
    with batch_progress() as on_progress:
        totals = run_batch(batch, on_progress)
    if as_json:
        print_json(totals)
        return
    before = f" ({totals.found} had theirs already)" if totals.found else ""
    print(f"{totals.requests} results in {out}{before}")
    if totals.done:
        speed = (totals.prompt_tokens + totals.new_tokens) / totals.seconds
        print(
            f"{totals.prompt_tokens} prompt tokens, {totals.cached_tokens} of them shared; "
            f"{totals.new_tokens} new ones; {totals.seconds:.1f} s, {speed:.0f} tokens/s"
        )
