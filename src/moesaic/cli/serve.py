"""``moesaic serve``: a model and its adapters behind OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.serve.request import EngineSettings
    from moesaic.serve.server.settings import ServerSettings

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def command(
    model: Annotated[str, typer.Argument(help="A model folder, or the folder of a training run.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter to load; may be given several times.")
    ] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option(help="Clients may load adapters from this folder. Default: they may load none.")
    ] = None,
    name: Annotated[str, typer.Option(help="What requests call the base model. Default: the folder's name.")] = "",
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with one API key a line; MOESAIC_API_KEYS holds more.")
    ] = None,
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
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are refused with 429.")] = 256,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Size of a request's body.")] = 4.0,
    max_prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt.", show_default="as the context allows")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of a continuation.", show_default="as the context allows")
    ] = None,
    isolate: Annotated[
        bool | None,
        typer.Option(
            "--isolate/--no-isolate",
            help="Make a request's tokens independent of its batch, bit for bit.",
            show_default="where the model computes in fp32 on a CPU",
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGINT or SIGTERM, requests in flight may take so long.")
    ] = 30.0,
) -> None:
    """Serve a model and its adapters by OpenAI's API, with a page at /; SIGINT and SIGTERM let requests end first."""
    from moesaic.errors import UsageError, did_you_mean
    from moesaic.serve.names import default_name, parse_adapters
    from moesaic.serve.request import EngineSettings
    from moesaic.serve.server.settings import ServerSettings, read_keys

    base = name or default_name(model)
    if dtype and dtype not in _DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}: {did_you_mean(dtype, _DTYPES)}")
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise UsageError(f"--adapter-dir: there is no folder at {str(adapter_dir)!r}")
    adapters = parse_adapters(adapter or [], base)
    kv_bytes = None if kv_gib is None else int(kv_gib * 2**30)
    engine = EngineSettings(16, kv_bytes, max_batch, token_budget, max_context, isolate=isolate)
    settings = ServerSettings(
        name=base,
        host=host,
        port=port,
        keys=read_keys(api_key_file),
        adapter_folder=adapter_dir,
        max_batch=max_batch,
        max_queue=max_queue,
        max_body=int(max_body_mib * 2**20),
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        drain_seconds=drain_seconds,
    )
    _serve(model, settings, engine, dtype, adapters)


def _serve(model: str, settings: ServerSettings, engine: EngineSettings, dtype: str, adapters: dict[str, Path]) -> None:
    import torch

    from moesaic.hf.load import model_folder
    from moesaic.serve.server.build import load
    from moesaic.serve.server.run import serve

    folder = model_folder(model)
    kind = getattr(torch, _DTYPES[dtype]) if dtype else None
    pool = settings.adapter_folder is not None
    serve(settings, lambda: load(folder, engine, dtype=kind, adapters=adapters, with_pool=pool))
