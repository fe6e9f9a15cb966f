"""Write the tables of recipe keys in ``docs/recipes.md`` and ``docs/adapters.md`` from the recipes' own descriptions,
ranges and defaults.

    .venv/bin/python scripts/recipe_table.py

A test holds the pages equal to what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moesaic.adapters.methods import METHODS, MethodSettings
from moesaic.adapters.recipe import TuneSettings
from moesaic.train.recipe import Recipe, Section, TrainSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- keys: made by scripts/recipe_table.py -->\n", "<!-- end of keys -->\n"
_LIMITS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


def recipe_tables() -> str:
    """The sections of a training recipe."""
    return _tables({f"[{name}]": section for name, section in Recipe.sections().items()})


def adapter_tables() -> str:
    """``[adapter]`` of every method that has keys, and what ``[train]`` has otherwise than in training."""
    shown = {f'[adapter], method = "{name}"': METHODS.get(name).settings for name in METHODS}
    own = {title: section for title, section in shown.items() if len(section.model_fields) > 1}
    return _tables({**own, "[train], where it differs from training": TuneSettings}, MethodSettings, TrainSettings)


def _tables(sections: dict[str, type[Section]], *known: type[Section]) -> str:
    """One Markdown table a section, without the fields that are as in ``known``."""
    parts = []
    for name, section in sections.items():
        rows = ["| key | default | range | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if any(repr(each.model_fields.get(key)) == repr(field) for each in known):
                continue
            default = "" if field.default is PydanticUndefined else _toml(field.default)
            meaning = (field.description or "").replace("|", "\\|")
            rows.append(f"| `{key}` | {default} | {_range(field)} | {meaning} |")
        parts.append(f"### {name}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """The pages with their tables made anew."""
    made = {}
    for name, tables in {"recipes.md": recipe_tables(), "adapters.md": adapter_tables()}.items():
        before, rest = (DOCS / name).read_text(encoding="utf-8").split(BEGIN)
        made[DOCS / name] = f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"
    return made


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
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
