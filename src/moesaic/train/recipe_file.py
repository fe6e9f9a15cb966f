"""Recipes from TOML files and ``key=value`` words, and errors that name the file, the key and what is allowed."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from moesaic.data.sources import STDLIB
from moesaic.errors import ConfigError, UsageError
from moesaic.train.recipe import DataSettings, Recipe, RunRecipe

COMMAND_LINE = "the command line"
_BALANCING = ["model", "balancing"]
R = TypeVar("R", bound=RunRecipe)


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] = (), kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read a recipe; without a path, the one that the kind of recipe has as its default: the demo.

    Args:
        overrides: ``key=value`` each. The key is dotted (``train.steps``) or bare (``steps``: no two sections share
            one); the value is TOML, or a string where it is no TOML. A key of a table (``model.balancing.z_loss``)
            adds to it, and one of a balancer (``model.balancing.z_loss.final``) makes a table of its coefficient.

    Raises:
        UsageError: where the file is missing or unreadable.
        ConfigError: where it is no TOML, a key is unknown or a value is not allowed; the message says all of them.
    """
    path = kind.default_file if path is None else Path(path)
    tables = {} if path is None else _read(path)
    return override(_validated(tables, repr(str(path)), kind.kind(tables, overrides)), overrides)


def override(recipe: R, overrides: Sequence[str]) -> R:
    """The recipe with ``key=value`` words applied; raises :class:`ConfigError` as :func:`load_recipe` does."""
    tables = recipe.model_dump()
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} on {COMMAND_LINE} is not of the form key=value")
        *sections, key = _full_key(name.strip(), recipe)
        table = tables
        for depth, section in enumerate(sections):
            value = table.get(section)
            if not isinstance(value, dict):
                # A number is the coefficient of the table that its balancer may have instead.
                table[section] = {"coefficient": value} if value is not None and sections[:depth] == _BALANCING else {}
            table = table[section]
        table[key] = _value(text)
    return _validated(tables, COMMAND_LINE, type(recipe))


def with_absolute_paths(recipe: R) -> R:
    """The recipe with the files and folders that its data names resolved, so that it means them from anywhere.

    Names (``stdlib``, a tokenizer of the hub) stay, and so does what does not exist.
    """
    changes: dict[str, Any] = {
        "sources": [source if source == STDLIB else _absolute_source(source) for source in recipe.data.sources]
    }
    if isinstance(recipe.data, DataSettings) and recipe.data.tokenizer:
        changes["tokenizer"] = absolute(recipe.data.tokenizer)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def _absolute_source(source: str) -> str:
    domain, equals, path = source.partition("=")
    if not equals or Path(source).exists():  # a path may hold an equals sign itself
        return absolute(source)
    return f"{domain}={absolute(path)}" if path else source


def absolute(text: str) -> str:
    """The path resolved, where it exists; else the text as it is."""
    path = Path(text)
    if path.is_dir():
        return str(path.resolve())
    # A file that is a link keeps its own name, which its documents are ordered by.
    return str(path.parent.resolve() / path.name) if path.exists() else text


def recorded_recipe(tables: dict[str, Any], where: str, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """A recipe that a run wrote down (JSON tables); ``where`` names its file in an error."""
    return _validated(tables, repr(where), kind.kind(tables, ()))


def _read(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no recipe {str(path)!r}") from None
    except OSError as error:
        raise UsageError(f"the recipe {str(path)!r} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {str(path)!r} is not TOML: {error}") from None
    name = re.sub(r"[^\w.-]+", "_", path.stem).lstrip(".-") or "recipe"
    return {"name": name, **tables}


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the text would let it set keys of its own.
    return parsed["value"] if len(parsed) == 1 else text


def _full_key(name: str, recipe: RunRecipe) -> list[str]:
    """``train.steps`` to its parts, also from ``steps``."""
    keys = recipe.known_keys()
    if "." not in name:
        matches = [key for key in keys if key.split(".")[-1] == name]
        if not matches:
            raise _unknown(name, COMMAND_LINE, type(recipe))
        return matches[0].split(".")
    if ".".join(name.split(".")[:2]) not in keys:
        raise _unknown(name, COMMAND_LINE, type(recipe))
    return name.split(".")


def _validated(tables: dict[str, Any], where: str, kind: type[R]) -> R:
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        errors = [dict(one) for one in error.errors()]
        lines = dict.fromkeys(_explained(one, where, kind) for one in errors if not _is_beside(one, errors))
        raise ConfigError("; ".join(lines)) from None


def _is_beside(error: dict[str, Any], errors: Sequence[dict[str, Any]]) -> bool:
    """Whether a value is no number, but a table in which an error says more."""
    *place, last = error["loc"]
    tables = [other["loc"] for other in errors if len(other["loc"]) > len(place) + 1]
    return last in _BRANCHES and any(list(longer[: len(place)]) == place for longer in tables)


def _explained(error: dict[str, Any], where: str, kind: type[RunRecipe]) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return str(_unknown(".".join(location), where, kind))
    key = ".".join(location[:2])
    if key in kind.sections():
        return f"{key} is {error['input']!r} in {where}: it must be a table, [{key}]"
    # Deeper parts of a location are tables' own keys, places in a list, or the branches of a union.
    deeper = [part for part in location[2:] if part not in _BRANCHES and "[" not in part]
    return f"{'.'.join([key, *deeper])} is {error['input']!r} in {where}: it must be {allowed(kind.known_keys()[key])}"


def _unknown(name: str, where: str, kind: type[RunRecipe]) -> ConfigError:
    keys, sections = list(kind.known_keys()), kind.sections()
    by_last = {key.split(".")[-1]: key for key in keys}
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    near = near or [by_last[last] for last in difflib.get_close_matches(name.split(".")[-1], by_last, n=1, cutoff=0.6)]
    section = name.split(".")[0]
    if section in sections:
        rest = f"allowed in [{section}]: {', '.join(sections[section].model_fields)}"
    else:
        single = ", ".join(key for key in keys if "." not in key)
        rest = f"allowed: {single}, and the keys of {', '.join(f'[{known}]' for known in sections)}"
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown recipe key {name!r} in {where}: {hint}{rest}")


_BRANCHES = ("bool", "int", "float", "str")
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "of length at least"}


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words: ``"an integer, at least 1"``."""
    return _allowed(field.annotation, field.metadata)


def _allowed(kind: Any, metadata: Sequence[Any]) -> str:
    bounds = [f"{words} {getattr(m, name)}" for m in metadata for name, words in _BOUNDS.items() if hasattr(m, name)]
    bounds += [f"matching {m.pattern}" for m in metadata if getattr(m, "pattern", None)]
    inner = get_args(kind)
    if kind in _KINDS:
        return ", ".join([_KINDS[kind], *bounds])
    if hasattr(kind, "__metadata__"):
        return _allowed(inner[0], [*_flattened(kind.__metadata__), *metadata])
    origin = getattr(kind, "__origin__", None)
    if origin is list:
        return ", ".join(["a list", *bounds, f"each {_allowed(inner[0], ())}"])
    if origin is tuple:
        return f"a list of {len(inner)}, each {_allowed(inner[0], ())}"
    if origin is dict:
        return f"a table, each value {_allowed(inner[1], ())}"
    if all(isinstance(choice, str) for choice in inner):
        return f"one of {', '.join(inner)}"
    return " or ".join(_allowed(choice, metadata) for choice in inner if choice is not type(None))


def _flattened(metadata: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    return flat
