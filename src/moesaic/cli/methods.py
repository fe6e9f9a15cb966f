"""The methods of ``moesaic convert``: which options each takes, how it is run, and what is said of what it made."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from moesaic.convert import Distilled, DistillSettings, Split

# What goes into the settings of the training, not into those of the split before it.
_TEACHING = {
    "minutes": "minutes",
    "train_tokens": "train_tokens",
    "loss": "loss",
    "labels": "labels",
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


def settings_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings' fields that the user gave, in the form that they have there."""
    if method not in METHODS:
        raise UsageError(f"no such method {method!r}: {did_you_mean(method, METHODS)}")
    for name in given:
        if name not in METHODS[method]:
            flag = name.replace("_", "-")
            owners = ", ".join(other for other, options in METHODS.items() if name in options)
            raise UsageError(f"--{flag} says nothing to --method {method}: it is an option of {owners}")
    _check_together(method, given)
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


def _check_together(method: str, given: Mapping[str, Any]) -> None:
    """Refuse what the method takes and would not look at, by the other options."""
    idle: list[tuple[tuple[str, ...], str]] = []
    if method == "merge" and given.get("into", "dense") == "dense":
        idle = [(("top_k", "router", "base_expert"), "merge into dense: it is for --into experts")]
    if method == "prune":
        if "trace" in given:
            idle = [(("tokens", "sequence_length"), "--trace, with which no text is read")]
        if given.get("how", "drop") == "drop" and given.get("by", "reap") in ("reap", "usage"):
            idle += [(("similarity",), "prune so: it is for --by similarity and for --how merge")]
    for names, where in idle:
        for name in names:
            if name in given:
                raise UsageError(f"--{name.replace('_', '-')} says nothing to {where}")


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
    if (tokens := fields.get("train_tokens", 1)) < 1:  # the settings would tell it of tokens, another option here
        raise ConfigError(f"--train-tokens is {tokens}: it must be a whole number from 1 on")
    return DistillSettings(**{"tokens" if name == "train_tokens" else name: value for name, value in fields.items()})


def _told_distilled(made: Distilled) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in made.shares.items())
    if not made.steps:  # the warm start's time is the budget's too
        spent = f"{made.seconds / 60:.1f} min"
        return f"fitted to the dense model's layers for {spent}, and not trained: the minutes were over"
    # A start that only writes what an earlier one has learned saw no loss.
    losses = "" if math.isnan(made.first) else f"; loss {made.first:.3f} at first, {made.last:.3f} at last"
    return (
        f"learned from the dense model for {made.seconds / 60:.1f} min: {made.steps} steps, {made.tokens:,} tokens "
        f"({shares} at the end){losses}"
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
        f"of {made.before} experts a layer {made.after} stay, which had {kept:.1%} of the routed slots; the others "
        + ("were merged into them" if settings.how == "merge" else "were dropped")
    ], made


RUN = {"dense": _dense, "split": _split, "distill": _distill, "upcycle": _upcycle, "merge": _merge, "prune": _prune}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
