"""The recipe of fine-tuning: each method has its own keys, and every key one meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.adapters import available
from moesaic.adapters.methods import METHODS
from moesaic.adapters.recipe import FinetuneRecipe
from moesaic.errors import ConfigError
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import allowed, load_recipe, recorded_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("method", available())
def test_a_recipe_has_the_keys_of_its_method(method: str) -> None:
    recipe = load_recipe(None, [f"method={method}"], FinetuneRecipe)
    assert type(recipe.adapter) is METHODS.get(method).settings
    assert recipe.adapter.method == method
    assert {key for key in recipe.flat() if key.startswith("adapter.")} == {
        f"adapter.{key}" for key in METHODS.get(method).settings.model_fields
    }
    assert recorded_recipe(json.loads(recipe.model_dump_json()), "run.json", FinetuneRecipe) == recipe
    names = [key.split(".")[-1] for key in recipe.known_keys()]
    assert len(set(names)) == len(names), "a bare key would be ambiguous"
    assert all(field.description for field in recipe.known_keys().values())
    assert all(allowed(field) for key, field in recipe.known_keys().items() if "." in key)


def test_the_written_method_counts_and_the_command_line_more(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[adapter]\nmethod = "lora"\n')
    assert load_recipe(path, ["rank=3"], FinetuneRecipe).flat()["adapter.rank"] == 3
    changed = load_recipe(path, ["adapter.method='esft'", "threshold=0.5"], FinetuneRecipe)
    assert (changed.adapter.method, changed.flat()["adapter.threshold"]) == ("esft", 0.5)
    path.write_text("[adapter]\nrank = 3\n")
    with pytest.raises(
        ConfigError, match=r"unknown recipe key 'adapter.rank' in .* allowed in \[adapter\]: method, sc"
    ):
        load_recipe(path, [], FinetuneRecipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter = 3", r"adapter is 3 in .*: it must be a table, \[adapter\]"),
        ("[adapter]\nmethod = 3", "adapter.method is 3: it must be one of esft, full, lora"),
        ("[adapter]\nmethod = 'lara'", "unknown fine-tuning method 'lara': did you mean 'lora'"),
        ("[model]\nd_model = 3", "unknown recipe key 'model' in .*: allowed: name, base, and the keys of"),
        ("[data]\ntokenizer = 'x'", "unknown recipe key 'data.tokenizer'"),
        ("base = 3", "base is 3 in .*: it must be a string"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [], FinetuneRecipe)


def test_where_the_base_lies_makes_no_difference() -> None:
    one, other = (load_recipe(None, [f"base={base}", "name=a"], FinetuneRecipe) for base in ("here", "there"))
    assert one.differences(other) == []
    full = load_recipe(None, ["method=full"], FinetuneRecipe)
    assert "adapter.method ('esft' then, 'full' now)" in full.differences(one)
    assert "adapter.threshold (0.2 then, None now)" in full.differences(one)
    assert Recipe().differences(Recipe(name="other")) == []


def test_the_recipe_that_comes_along_is_sound() -> None:
    recipe = load_recipe(RECIPES / "finetune.toml", ["base=runs/demo"], FinetuneRecipe)
    assert (recipe.name, recipe.adapter.method, recipe.data.mixture) == ("coder", "esft", {"code": 1.0})
