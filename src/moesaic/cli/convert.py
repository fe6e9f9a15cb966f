"""``moesaic convert``: dense models to mixtures of experts, merges, and mixtures with fewer experts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.errors import ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from moesaic.convert import Distilled, DistillSettings, Split

# What goes into the settings of the training, not into those of the split before it.
_TEACHING = {
    "minutes": "minutes",
    "train_tokens": "train_tokens",
    "loss": "loss",
    "mixture": "mixture",
    "learning_rate": "learning_rate",
}
# What both take.
_SHARED = ("data", "sequence_length", "seed")
# Method -> option of this command -> field of the method's settings.
METHODS: dict[str, dict[str, str]] = {
    "dense": {},
    "split": {
        "experts": "experts",
        "shared": "shared",
        "active": "active",
        "criterion": "criterion",
        "pre_gating": "pre_gating",
        "data": "data",
        "tokens": "tokens",
        "sequence_length": "sequence_length",
        "seed": "seed",
        **_TEACHING,
    },
    "distill": {
        "teacher": "teacher",
        "data": "data",
        "sequence_length": "sequence_length",
        "seed": "seed",
        **_TEACHING,
    },
    "upcycle": {
        "experts": "num_experts",
        "top_k": "top_k",
        "perturb": "perturb",
        "drop": "drop",
        "noise": "noise",
        "router": "router",
        "seed": "seed",
    },
    "merge": {
        "with": "models",
        "into": "into",
        "by": "by",
        "option": "options",
        "weights": "weights",
        "layer_weights": "layer_weights",
        "base_expert": "with_base",
        "top_k": "top_k",
        "router": "router",
        "seed": "seed",
    },
    "prune": {
        "keep": "keep",
        "share": "share",
        "how": "how",
        "by": "by",
        "similarity": "similarity",
        "trace": "trace",
        "data": "data",
        "tokens": "tokens",
        "sequence_length": "sequence_length",
    },
}
_SPLIT, _UPCYCLE, _MERGE, _PRUNE = (f"--method {name}" for name in ("split", "upcycle", "merge", "prune"))
_TEACH, _TEXT = "Training after --method split, and --method distill", "Text: split, distill and prune"


def command(
    model: Annotated[str, typer.Argument(help="A model folder, that of a training run, or a .gguf file.")],
    to: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    method: Annotated[str, typer.Option(help="split, distill, upcycle, merge, prune, or dense.")],
    experts: Annotated[
        int | None,
        typer.Option(help="Routed experts of a layer; 16 for split, 8 for upcycle by default.", rich_help_panel=_SPLIT),
    ] = None,
    active: Annotated[
        float | None,
        typer.Option(
            help="The share of the feed-forward's parameters that a token uses, shared ones counted; 0.5 by default.",
            rich_help_panel=_SPLIT,
        ),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(help="Hidden neurons of a shared expert, which every token uses.", rich_help_panel=_SPLIT),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What puts neurons into one expert: routed (the default), coactivation, weight, or domain.",
            rich_help_panel=_SPLIT,
        ),
    ] = None,
    pre_gating: Annotated[
        str | None,
        typer.Option(
            help="none: a router in each layer; stack: one that decides for all, from the token's embedding (Read-ME).",
            rich_help_panel=_SPLIT,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Learn from the dense model for so long.", rich_help_panel=_TEACH),
    ] = None,
    train_tokens: Annotated[
        int | None, typer.Option(help="Instead of --minutes: on so many tokens of text.", rich_help_panel=_TEACH)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="distill: the dense model that MODEL, a mixture, was made of.", rich_help_panel=_TEACH),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="kl (the default), reverse_kl, or taid.", rich_help_panel=_TEACH)
    ] = None,
    mixture: Annotated[
        str | None,
        typer.Option(
            help="Shares of the text's domains: excess (more of what is furthest behind, the default), even, or "
            "tokens, as they come.",
            rich_help_panel=_TEACH,
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest.", rich_help_panel=_TEACH)] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts of a token (also for merge into experts); 2 by default.", rich_help_panel=_UPCYCLE),
    ] = None,
    perturb: Annotated[
        bool | None,
        typer.Option(
            help="Make the copies different without changing what they compute; on by default.",
            rich_help_panel=_UPCYCLE,
        ),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            help="Share of each copy's neurons that is drawn anew (Drop-Upcycling).", rich_help_panel=_UPCYCLE
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="What is added to each copy, relative to its own values.", rich_help_panel=_UPCYCLE),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="Router of the new experts (also for merge into experts).", rich_help_panel=_UPCYCLE),
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="A model that was fine-tuned from MODEL, which is the base; may be given several times.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="dense: one model like the base; experts: a mixture with one expert for each (Branch-Train-MiX).",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="merge: linear (the default), slerp, task_arithmetic, ties, dare, dare_ties, breadcrumbs or "
            "consensus; prune: reap (the default), usage or similarity.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One a model, with commas: 0.7,0.3.", rich_help_panel=_MERGE)
    ] = None,
    layer_weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Other weights for some layers: 0-9=1,0 or 20:ffn=0,1 or outside=0.5,0.5; may be given several times.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of the merge method, such as density=0.2; may be given several times.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    base_expert: Annotated[
        bool | None, typer.Option(help="The base is an expert too; on by default.", rich_help_panel=_MERGE)
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Experts of a layer that stay.", rich_help_panel=_PRUNE)] = None,
    share: Annotated[
        float | None, typer.Option(help="Instead of --keep: the part of the experts that goes.", rich_help_panel=_PRUNE)
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(help="drop them (the default), or merge them into those that stay.", rich_help_panel=_PRUNE),
    ] = None,
    similarity: Annotated[
        str | None,
        typer.Option(help="Experts are alike by their outputs (the default) or weights.", rich_help_panel=_PRUNE),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Instead of text: the trace in a report of moesaic inspect, for --by usage.", rich_help_panel=_PRUNE
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A file or folder of text, DOMAIN=PATH, or 'stdlib', the default; may be given several times.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="split, prune: about how many of it to measure on.", rich_help_panel=_TEXT)
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens that the model sees at once.", rich_help_panel=_TEXT)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    shard_gib: Annotated[float, typer.Option(help="The largest file of weights, and the memory for it.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a mixture of experts from a dense model, merge models, or prune a mixture; MODEL stays as it is.

    split: each feed-forward is cut into experts of neurons that are active together; with all on, the same model.
    With --minutes (or --train-tokens) the mixture then learns from MODEL what it lost.

    distill: a mixture that was split or upcycled learns from the dense model that it was made of.

    upcycle: every expert is a copy of the feed-forward; the same model until it is trained.

    merge: several models that were fine-tuned from MODEL become one, or a mixture with an expert for each.

    prune: the least useful experts of a mixture go, or are merged into the others.

    dense: the same model as safetensors, such as of a .gguf file, which every other command then reads.

    Interrupted, the same command goes on.
    """
    given = {name.rstrip("_"): value for name, value in locals().items() if value is not None}
    for own in ("model", "to", "method", "shard_gib", "as_json"):
        del given[own]
    fields = _fields(method, given)
    if not 0 < shard_gib < 1e6:
        raise ConfigError(f"--shard-gib is {shard_gib:g}: it must be above 0")
    lines, made = _RUN[method](model, to, fields, int(shard_gib * 2**30))
    if as_json:
        from moesaic.cli.output import print_json

        print_json({"method": method, "folder": to, "made": made})
        return
    print("\n".join(lines))
    written = made if method == "dense" else made.written
    size = f"{written.parameters / 1e6:,.1f} M parameters, {written.nbytes / 1e6:,.0f} MB"
    print(f"wrote {to}: {size}" + (f" in {written.shards} files" if written.shards > 1 else ""))
    if method in ("split", "distill", "upcycle"):
        print(f"what it keeps of the dense model: moesaic eval {to} --against {teacher or model}")


def _fields(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings' fields that the user gave, in the form that they have there."""
    if method not in METHODS:
        raise UsageError(f"no such method {method!r}: {did_you_mean(method, METHODS)}")
    for name in given:
        if name not in METHODS[method]:
            flag = name.replace("_", "-")
            owners = " and ".join(other for other, options in METHODS.items() if name in options)
            raise UsageError(f"--{flag} says nothing to --method {method}: it is an option of {owners}")
    parse: dict[str, Callable[[Any], Any]] = {
        "data": tuple,
        "with": tuple,
        "weights": lambda text: _numbers("--weights", text),
        "layer_weights": lambda texts: {
            place: _numbers("--layer-weights", text) for place, text in _pairs("--layer-weights", texts)
        },
        "option": lambda texts: {name: _value(text) for name, text in _pairs("--option", texts)},
    }
    return {METHODS[method][name]: parse.get(name, lambda value: value)(value) for name, value in given.items()}


def _pairs(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    parts = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, value) in zip(texts, parts, strict=True) if not (name and value)]:
        raise ConfigError(f"{flag} is {wrong[0]!r}: it must be NAME=VALUE")
    return [(name, value) for name, _, value in parts]


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}: it must be numbers with commas between them") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _dense(model: str, out: Path, fields: dict[str, Any], shard_bytes: int) -> tuple[list[str], Any]:
    from moesaic.convert import unpack

    return ["nothing changed but the files"], unpack(model, out, say=_say, shard_bytes=shard_bytes)


def _split(model: str, out: Path, fields: dict[str, Any], shard_bytes: int) -> tuple[list[str], Any]:
    from moesaic.convert import SplitSettings, split, split_and_distill

    own = {name: value for name, value in fields.items() if name not in _TEACHING}
    if len(own) == len(fields):
        made = split(model, out, SplitSettings(**own), say=_say, shard_bytes=shard_bytes)
        return _told_split(made), made
    teaching = _teaching({name: value for name, value in fields.items() if name in {*_TEACHING, *_SHARED}})
    taught = split_and_distill(model, out, SplitSettings(**own), teaching, say=_say, shard_bytes=shard_bytes)
    return [*(_told_split(taught.split) if taught.split else []), _told_distilled(taught.distilled)], taught


def _told_split(made: Split) -> list[str]:
    plan = made.plan
    shared = f" and {plan.shared} shared neurons" if plan.shared else ""
    lines = [
        f"each of {made.layers} feed-forwards: {plan.experts} experts of {plan.d_ff} neurons{shared}; a token uses "
        f"{plan.top_k} of them, {made.active:.1%} of the parameters",
    ]
    if made.explained:
        best = f" ({_mean(made.explained_best):.1%} with the best experts)"
        lines.append(f"of the feed-forwards' output the routers keep {_mean(made.explained):.1%}{best}")
    return lines


def _distill(model: str, out: Path, fields: dict[str, Any], shard_bytes: int) -> tuple[list[str], Any]:
    from moesaic.convert import distill

    if "teacher" not in fields:
        raise UsageError("--method distill learns from a dense model: give it as --teacher")
    own = {name: value for name, value in fields.items() if name != "teacher"}
    made = distill(model, fields["teacher"], out, _teaching(own), say=_say, shard_bytes=shard_bytes)
    return [_told_distilled(made)], made


def _teaching(fields: dict[str, Any]) -> DistillSettings:
    from moesaic.convert import DistillSettings

    if ("minutes" in fields) == ("train_tokens" in fields):
        raise UsageError("training needs a budget: give one of --minutes and --train-tokens")
    return DistillSettings(**{"tokens" if name == "train_tokens" else name: value for name, value in fields.items()})


def _told_distilled(made: Distilled) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in made.shares.items())
    return (
        f"learned from the dense model for {made.seconds / 60:.1f} min: {made.steps} steps, {made.tokens:,} tokens "
        f"({shares} at the end); loss {made.first:.3f} at first, {made.last:.3f} at last"
    )


def _upcycle(model: str, out: Path, fields: dict[str, Any], shard_bytes: int) -> tuple[list[str], Any]:
    from moesaic.convert import UpcycleSettings, upcycle

    settings = UpcycleSettings(**fields)
    made = upcycle(model, out, settings, say=_say, shard_bytes=shard_bytes)
    return [
        f"{settings.num_experts} experts a layer; a token uses {settings.top_k}, "
        f"{made.active_parameters / made.dense_parameters:.3g} times the dense feed-forward's parameters",
        f"distance of a layer's output from the dense one: {max(made.distance):.2g} at most",
    ], made


def _merge(model: str, out: Path, fields: dict[str, Any], shard_bytes: int) -> tuple[list[str], Any]:
    from moesaic.convert import MergeSettings, merge

    settings = MergeSettings(**{"models": (), **fields})
    made = merge(model, out, settings, say=_say, shard_bytes=shard_bytes)
    count = f"{len(settings.models)} model{'s' if len(settings.models) > 1 else ''} of this base"
    if made.experts:
        line = f"{count} became {made.experts} experts a layer; their routers know nothing yet: train the mixture"
        return [line], made
    return [f"{count} merged by {settings.by}"], made


def _prune(model: str, out: Path, fields: dict[str, Any], shard_bytes: int) -> tuple[list[str], Any]:
    from moesaic.convert import PruneSettings, prune

    settings = PruneSettings(**fields)
    made = prune(model, out, settings, say=_say, shard_bytes=shard_bytes)
    kept = _mean([layer.kept for layer in made.layers.values()])
    return [
        f"of {made.before} experts a layer {made.after} stay, which took {kept:.1%} of the tokens; the others were "
        + ("merged into them" if settings.how == "merge" else "dropped")
    ], made


_RUN = {"dense": _dense, "split": _split, "distill": _distill, "upcycle": _upcycle, "merge": _merge, "prune": _prune}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
