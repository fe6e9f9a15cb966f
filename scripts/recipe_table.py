"""Write the table of recipe keys in ``docs/recipes.md`` from the recipe's own descriptions, ranges and defaults.

    .venv/bin/python scripts/recipe_table.py

A test holds the page equal to what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moesaic.train.recipe import Recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- keys: made by scripts/recipe_table.py -->\n", "<!-- end of keys -->\n"
_LIMITS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


def tables() -> str:
    """One Markdown table a section."""
    parts = []
    for name, section in Recipe.sections().items():
        rows = ["| key | default | range | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            default = "" if field.default is PydanticUndefined else _toml(field.default)
            meaning = (field.description or "").replace("|", "\\|")
            rows.append(f"| `{key}` | {default} | {_range(field)} | {meaning} |")
        parts.append(f"### [{name}]\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def page() -> str:
    """The whole page with its table made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return f"`{{ {', '.join(f'{key} = {item}' for key, item in value.items())} }}`" if value else "`{}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _range(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(get_args(field.annotation))
    limits = []
    for rule in field.metadata:
        for kind, (attribute, sign) in _LIMITS.items():
            if isinstance(rule, kind):
                limit = getattr(rule, attribute)
                limits.append(f"{sign} {'2⁶³' if limit == 2**63 else limit}")
    return ", ".join(limits)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
