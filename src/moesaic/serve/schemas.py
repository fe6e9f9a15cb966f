"""JSON schemas that no finite document meets: what llguidance does not find before it generates for ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_KEYS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_KEYS_OF_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_KEYS_OF_ONE = ("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames")


def endless_part(schema: Any) -> str | None:
    """The reference (``#/...``) that every document would have to follow for ever; None where a document can end.

    A part that other parts refer to can end as soon as some way through it needs only parts that can end: what can end
    grows until nothing is added. References elsewhere, to anchors or by ``$id``, count as parts that end.
    """
    names = dict.fromkeys(_references(schema))
    parts = {name: found for name in names if (found := _look_up(schema, name)) is not None}
    ending: set[str] = set(names) - set(parts)
    referring: dict[str, list[str]] = {name: [] for name in parts}
    for name, part in parts.items():
        for other in dict.fromkeys(_references(part)):
            if other in parts:
                referring[other].append(name)
    # After the first round only what refers to a part that was added: a long chain is not walked for each of its links.
    asked = list(parts)
    while more := {name for name in asked if name not in ending and _ends(parts[name], ending)}:
        ending |= more
        asked = list(dict.fromkeys(name for added in more for name in referring[added]))
    if _ends(schema, ending):
        return None
    return next(name for name in parts if name not in ending)


def _ends(schema: Any, ending: set[str]) -> bool:
    """Whether a document that meets ``schema`` can end, where references outside of ``ending`` can not."""
    if not isinstance(schema, Mapping):
        return True
    if isinstance(name := schema.get("$ref"), str) and name not in ending:
        return False
    if not all(_ends(part, ending) for part in _list(schema.get("allOf"))):
        return False
    for key in ("anyOf", "oneOf"):
        if (choices := _list(schema.get(key))) and not any(_ends(part, ending) for part in choices):
            return False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if any(kind not in ("object", "array") for kind in kinds):
        return True  # a plain value, or any
    return ("object" in kinds and _object_ends(schema, ending)) or ("array" in kinds and _array_ends(schema, ending))


def _object_ends(schema: Mapping[str, Any], ending: set[str]) -> bool:
    properties = schema.get("properties")
    others = schema.get("additionalProperties")
    known = properties if isinstance(properties, Mapping) else {}
    return all(
        _ends(known.get(name, others), ending) for name in _list(schema.get("required")) if isinstance(name, str)
    )


def _array_ends(schema: Mapping[str, Any], ending: set[str]) -> bool:
    least = schema.get("minItems", 0)
    if not isinstance(least, int) or least < 1:
        return True
    first = _list(schema.get("prefixItems"))[:least]
    rest = [schema.get("items")] if least > len(first) else []
    return all(_ends(part, ending) for part in [*first, *rest])


def _references(schema: Any) -> Iterator[str]:
    """Every ``$ref`` in a schema."""
    if not isinstance(schema, Mapping):
        return
    if isinstance(name := schema.get("$ref"), str):
        yield name
    inner = [schema.get(key) for key in _KEYS_OF_ONE]
    for key in _KEYS_OF_LISTS:
        inner += _list(schema.get(key))
    for key in _KEYS_OF_SCHEMAS:
        inner += schema[key].values() if isinstance(schema.get(key), Mapping) else []
    for part in inner:
        yield from _references(part)


def _look_up(schema: Any, name: str) -> Any:
    if name == "#":
        return schema
    if not name.startswith("#/"):
        return None
    found = schema
    for key in name[2:].split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
