"""What takes part in the study: a recipe each, what its paper claims, and what we say of it after looking."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, did_you_mean
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import load_recipe, with_absolute_paths

VERDICTS = ("yes", "no", "unclear")
CLAIMS = {
    "quality": "lower loss at equal compute",
    "parity": "no higher loss",
    "compute": "fewer parameters used per token, at no higher loss",
    "balance": "a more even load",
    "imbalance": "a less even load",
    "specialization": "experts that know their domain better",
    "throughput": "more tokens per second through the trained model",
    "worse": "a higher loss",
}


@dataclass(frozen=True)
class Entry:
    """One recipe of the study.

    Attributes:
        recipe: as its file says it, with absolute paths.
        title: how the page calls it.
        paper: where the mechanism is from.
        claims: names of :data:`CLAIMS`, all of which must show; none for what others are compared with.
        against: the entry that it is compared with.
        held: what is equal between the two.
        verdict: what ``sentence`` says of the claims, one of :data:`VERDICTS`; None where nobody has looked yet.
        sentence: with figures as fields of ``str.format``, see :func:`moesaic.bench.study.page.fields`.
    """

    name: str
    recipe: Recipe
    title: str
    paper: str = ""
    claims: tuple[str, ...] = ()
    against: str = ""
    held: str = ""
    verdict: str | None = None
    sentence: str = ""

    def run(self, seed: int, steps: int | None) -> Recipe:
        """The recipe of one run: one thread, so that several runs share the cores without a word to each other."""
        changes: dict[str, Any] = {"seed": seed, "threads": 1, "save_every": 0}
        if steps is not None:
            changes |= {"steps": steps, "warmup_steps": None}
        train = self.recipe.train.model_copy(update=changes)
        return self.recipe.model_copy(update={"train": train, "name": f"{self.name}-{seed}"})


def load_entries(recipes: Path, table: Path) -> dict[str, Entry]:
    """Every recipe of a folder with what a table (TOML, a section a recipe) says of it, in the order of the table.

    Raises:
        ConfigError: where a recipe has no section or a section no recipe, or a section says what is not allowed.
    """
    told = tomllib.loads(table.read_text(encoding="utf-8"))
    files = {path.stem: path for path in sorted(recipes.glob("*.toml"))}
    if odd := sorted(set(told) ^ set(files)):
        raise ConfigError(f"{odd[0]!r} must be both a recipe of {str(recipes)!r} and a section of {str(table)!r}")
    return {name: _entry(name, files[name], section, told) for name, section in told.items()}


def _entry(name: str, path: Path, section: Mapping[str, Any], told: Mapping[str, Any]) -> Entry:
    entry = Entry(name, with_absolute_paths(load_recipe(path)), **{**section, "claims": tuple(section["claims"])})
    for claim in entry.claims:
        if claim not in CLAIMS:
            raise ConfigError(f"claim {claim!r} of {name!r} is unknown: {did_you_mean(claim, CLAIMS)}")
    if entry.claims and (entry.against == name or entry.against not in told):
        raise ConfigError(f"{name!r} is compared with {entry.against!r}: {did_you_mean(entry.against, told)}")
    if entry.verdict not in (None, *VERDICTS):
        raise ConfigError(f"the verdict on {name!r} is {entry.verdict!r}: it must be one of {', '.join(VERDICTS)}")
    return entry


def chosen(entries: Mapping[str, Entry], only: Sequence[str]) -> dict[str, Entry]:
    """The entries of these names, all without any; raises :class:`ConfigError` for an unknown one."""
    for name in only:
        if name not in entries:
            raise ConfigError(f"unknown recipe {name!r}: {did_you_mean(name, entries)}")
    return {name: entry for name, entry in entries.items() if name in only or not only}
