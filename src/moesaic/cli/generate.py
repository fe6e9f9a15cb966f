"""``moesaic generate``: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moesaic.errors import ConfigError

Steps = Annotated[int | None, typer.Option(help="Gradient steps of each optimization.", show_default="5")]
Rate = Annotated[float | None, typer.Option(help="About how far a step moves a logit.", show_default="0.05")]
Interval = Annotated[
    int | None,
    typer.Option(help="New tokens between two optimizations; 0 for the prompt only.", show_default="128"),
]
Layers = Annotated[
    float | None, typer.Option(help="The share of the layers that adapt, the most confident.", show_default="0.5")
]
Tokens = Annotated[
    int | None, typer.Option(help="Read at most so many tokens of the context.", show_default="2048, the last ones")
]


def command(
    model: Annotated[str, typer.Argument(help="A model folder, or the folder of a training run.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; '-' reads standard input.")] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="At most so many new tokens.", show_default="128, or what the context has room for"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the K most probable tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the fewest tokens with this much probability.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the best one's probability.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    adapter: Annotated[
        str, typer.Option(help="An adapter of the model, to be used with it: its folder, or that of its run.")
    ] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Format the prompt by the model's chat template.")] = False,
    rewire: Annotated[
        bool, typer.Option("--rewire", help="Let the routers adapt to the prompt, and to the text as it grows.")
    ] = False,
    rewire_steps: Steps = None,
    rewire_learning_rate: Rate = None,
    rewire_interval: Interval = None,
    rewire_layers: Layers = None,
    rewire_max_tokens: Tokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Continue a prompt with our model or any causal language model of transformers on disk."""
    from moesaic.cli.output import print_json
    from moesaic.hf.generation import Sampling, generate
    from moesaic.hf.load import load_model

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    rewiring = _rewiring(
        rewire,
        steps=rewire_steps,
        learning_rate=rewire_learning_rate,
        interval=rewire_interval,
        layers=rewire_layers,
        max_tokens=rewire_max_tokens,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    if adapter:
        from moesaic.adapters.merging import load_adapted

        loaded, tokenizer = load_adapted(model, adapter)
    else:
        loaded, tokenizer = load_model(model)
    if as_json:
        print_json(generate(loaded, tokenizer, text, sampling, chat=chat, rewire=rewiring))
        return
    prompt_left = ["" if chat else text]  # printed with the first piece: what is refused leaves nothing

    def say(piece: str) -> None:
        print(*prompt_left, piece, sep="", end="", flush=True)
        prompt_left.clear()

    generate(loaded, tokenizer, text, sampling, chat=chat, on_text=say, rewire=rewiring)
    print(*prompt_left)


def _rewiring(wanted: bool, **settings: Any) -> Any:
    """The settings that were given; None without ``--rewire``.

    Raises:
        ConfigError: for a setting without it, or out of range.
    """
    from moesaic.hf.rewiring import Rewiring

    given = {name: value for name, value in settings.items() if value is not None}
    if given and not wanted:
        raise ConfigError(f"--rewire-{next(iter(given)).replace('_', '-')} needs --rewire")
    return Rewiring(**given) if wanted else None
