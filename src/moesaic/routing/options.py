"""The options of a part that a configuration names: the keyword-only arguments of its class, checked beforehand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

from moesaic.errors import ConfigError, did_you_mean

KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}


def check_options(part: str, kind: type, options: Mapping[str, Any], besides: tuple[str, ...] = ()) -> None:
    """Refuse options that a class does not have, with the nearest one that it has, or of another type.

    Args:
        part: what the message calls it, such as ``"router 'softmax_topk'"``.
        besides: names that are allowed in the same place, for the message.

    Raises:
        ConfigError: which names the option and what is allowed.
    """
    parameters = inspect.signature(kind).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    types = get_type_hints(kind.__init__) if allowed else {}  # type: ignore[misc]
    for key, value in options.items():
        if key not in allowed:
            raise ConfigError(f"{part} has no option {key!r}: {did_you_mean(key, [*allowed, *besides])}")
        wanted: Any = types.get(key)
        if wanted in KINDS and not is_of(wanted, value):
            raise ConfigError(f"option {key!r} of {part} is {value!r}: it must be {KINDS[wanted]}")


def is_of(kind: type, value: object) -> bool:
    """Whether a setting's value is of its kind: True is no number, a whole number is a float too, NaN is none."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
