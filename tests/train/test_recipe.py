"""Recipes: the defaults, what a file and a command line may say, and what they are told when they may not."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

import moesaic
from moesaic.errors import ConfigError, UsageError
from moesaic.train.model import build_config
from moesaic.train.recipe import HARMLESS, Recipe
from moesaic.train.recipe_file import allowed, load_recipe, recorded_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

# What is written; what must stand in the error.
MISTAKES = [
    (
        ["train.stpes=3"],
        ["unknown recipe key 'train.stpes'", "did you mean 'train.steps'?", "allowed in [train]: steps,"],
    ),
    (["stpes=3"], ["unknown recipe key 'stpes'", "did you mean 'train.steps'?"]),
    (["model.learning_rate=3"], ["unknown recipe key 'model.learning_rate'", "did you mean 'train.learning_rate'?"]),
    (
        ["optimizer.lr=3"],
        ["unknown recipe key 'optimizer.lr'", "allowed: name, and the keys of [model], [data], [train]"],
    ),
    (["train=3"], ["unknown recipe key 'train'"]),
    (["steps"], ["'steps'", "key=value"]),
    (["train.steps=0"], ["train.steps is 0 in the command line: it must be an integer, at least 1"]),
    (["train.steps=1.5"], ["train.steps is 1.5", "an integer, at least 1"]),
    (["train.steps=many"], ["train.steps is 'many'", "an integer, at least 1"]),
    (["train.steps=true"], ["train.steps is True", "an integer"]),
    (["train.learning_rate=0"], ["train.learning_rate is 0", "a number, above 0"]),
    (["train.learning_rate=nan"], ["train.learning_rate is nan", "a number, above 0"]),
    (["train.learning_rate=inf"], ["train.learning_rate is inf"]),
    (["train.final_learning_rate=1.5"], ["a number, at least 0, at most 1"]),
    (["train.betas=[0.9, 1.0]"], ["train.betas.1 is 1.0", "a list of 2, each a number, at least 0, below 1"]),
    (["train.betas=[0.9]"], ["train.betas", "a list of 2"]),
    (["train.precision=fp8"], ["train.precision is 'fp8'", "one of auto, fp32, bf16"]),
    (["train.compile=1"], ["train.compile is 1", "true or false"]),
    (["data.validation_fraction=1"], ["data.validation_fraction is 1", "above 0, below 1"]),
    (["data.vocab_size=100"], ["data.vocab_size is 100", "an integer, at least 257"]),
    (["data.sources=[]"], ["data.sources is []", "a list, of length at least 1, each a string"]),
    (["data.mixture.code=-1"], ["data.mixture.code is -1", "a table, each value a number, at least 0"]),
    (["data.tokenizer=7"], ["data.tokenizer is 7", "a string"]),
    (["model.dense_layers=[0, -1]"], ["model.dense_layers.1 is -1", "a list, each an integer, at least 0"]),
    (["model.router_options.scale=[1]"], ["model.router_options.scale is [1]", "a table, each value true or false or"]),
    (["model.balancing=3"], ["model.balancing is 3", "a table, each value a number or a table"]),
    (
        ["model.balancing.z_loss=x"],
        ["model.balancing.z_loss is 'x'", "a number or a table, each value true or false or"],
    ),
    (["model.balancing.z_loss.final=[1]"], ["model.balancing.z_loss.final is [1]", "a table, each value a number or"]),
    (["name=a/b"], ["name is 'a/b'", "a string, matching"]),
    (["steps=0", "d_ff=0"], ["train.steps is 0", "model.d_ff is 0"]),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=lambda value: value[0][:40])
def test_a_mistake_on_the_command_line_is_explained(words: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe(None, words)
    assert "\n" not in str(raised.value)
    for part in expected:
        assert part in str(raised.value)


FILES = [
    ("[train]\nsteps = 0\n", "train.steps is 0 in {path!r}: it must be an integer, at least 1"),
    ("[train]\nlearning-rate = 1\n", "unknown recipe key 'train.learning-rate' in {path!r}: did you mean 'train.learn"),
    ("[trian]\nsteps = 1\n", "unknown recipe key 'trian' in {path!r}"),
    ("train = 3\n", "train is 3 in {path!r}: it must be a table, [train]"),
    ("[train\n", "the recipe {path!r} is not TOML"),
    ("name = 3\n", "name is 3 in {path!r}: it must be a string"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_mistake_in_a_file_names_the_file(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    assert expected.format(path=str(path)) in str(raised.value)


def test_a_file_that_is_no_text_is_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(("name", "expected"), [("none.toml", "there is no recipe"), (".", "cannot be read")])
def test_a_file_that_is_not_there_is_explained(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected):
        load_recipe(tmp_path / name)


def test_without_a_file_the_demo_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe() == load_recipe(RECIPES / "demo.toml")
    assert load_recipe(None, ["steps=10"]).model == load_recipe().model


def test_the_demo_is_part_of_the_package() -> None:
    assert Recipe.default_file.is_relative_to(Path(moesaic.__file__).parent)
    assert (RECIPES / "demo.toml").resolve() == Recipe.default_file.resolve()
    patterns = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "train/demo.toml" in patterns["moesaic"]


def test_the_demo_is_tuned_and_what_others_start_from_is_ordinary(tmp_path: Path) -> None:
    demo = load_recipe()
    assert (demo.model.d_model, demo.model.init_std, demo.data.sequence_length) == (192, 0.06, 256)
    assert (demo.train.steps, demo.train.warmup, demo.train.batch_size) == (1400, 84, 4)
    assert (demo.train.learning_rate, demo.train.final_learning_rate) == (5e-3, 0.0)
    (tmp_path / "mine.toml").write_text("")
    mine = load_recipe(tmp_path / "mine.toml")
    assert (mine.model, mine.data, mine.train) == (Recipe().model, Recipe().data, Recipe().train)
    assert (mine.model.init_std, mine.train.batch_size) == (0.02, 16)
    assert (mine.train.learning_rate, mine.train.final_learning_rate) == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("words", "warmup"),
    [(["steps=10"], 0), (["steps=50"], 3), (["steps=100000"], 1000), (["steps=10", "warmup_steps=7"], 7)],
)
def test_warm_up_follows_the_steps_unless_it_is_set(words: list[str], warmup: int) -> None:
    assert load_recipe(None, words).train.warmup == warmup


def test_the_demo_spells_out_every_key_that_has_a_value() -> None:
    tables = tomllib.loads((RECIPES / "demo.toml").read_text())
    written = {f"{section}.{key}" for section in Recipe.sections() for key in tables[section]}
    assert written == {key for key, value in load_recipe().flat().items() if value is not None} - {"name"}


# Those of fine-tuning are tested with it.
@pytest.mark.parametrize("path", sorted({*RECIPES.glob("*.toml")} - {RECIPES / "finetune.toml"}), ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_named_like_its_file(path: Path) -> None:
    from moesaic.train.model import check

    recipe = load_recipe(path)
    check(recipe)
    assert recipe.name == path.stem


def test_values_are_toml_or_strings_and_keys_dotted_or_bare() -> None:
    words = ["steps=7", "train.learning_rate = 1", "model.router=sigmoid_topk", 'data.sources=["a", "b=c"]', "clip=0.5"]
    recipe = load_recipe(None, words)
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.train.clip) == (7, 1.0, 0.5)
    assert recipe.model.router == "sigmoid_topk"
    assert recipe.data.sources == ["a", "b=c"]


def test_one_source_needs_no_list() -> None:
    assert load_recipe(None, ["data.sources=stdlib"]).data.sources == ["stdlib"]


def test_the_last_word_counts() -> None:
    assert load_recipe(None, ["steps=7", "train.steps=9"]).train.steps == 9


def test_a_table_is_replaced_and_its_keys_are_added() -> None:
    assert load_recipe(None, ["model.balancing.z_loss=0.1"]).model.balancing == {"load_balancing": 0.01, "z_loss": 0.1}
    assert load_recipe(None, ["model.balancing={z_loss=0.1}"]).model.balancing == {"z_loss": 0.1}
    assert load_recipe(None, ["data.mixture.code=1"]).data.mixture == {"code": 1.0}


def test_a_balancers_coefficient_becomes_a_table() -> None:
    words = ["model.balancing.load_balancing.final=0.0", "model.balancing.load_balancing.per_rank=true"]
    wanted = {"load_balancing": {"coefficient": 0.01, "final": 0.0, "per_rank": True}}
    recipe = load_recipe(None, words)
    assert recipe.model.balancing == wanted
    again = load_recipe(None, [*words, "model.balancing.load_balancing.coefficient=0.5"]).model.balancing
    assert again == {"load_balancing": {**wanted["load_balancing"], "coefficient": 0.5}}
    assert load_recipe(None, [*words, "model.balancing.load_balancing=0.5"]).model.balancing == {"load_balancing": 0.5}
    filled = build_config(recipe, 300).balancing
    assert filled == {"load_balancing": {**wanted["load_balancing"], "steps": recipe.train.steps}}


def test_a_value_cannot_smuggle_in_another_key() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps is '7"):
        load_recipe(None, ["train.steps=7\nseed = 8"])


def test_a_file_without_a_name_is_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 5\n")
    recipe = load_recipe(tmp_path / "mine.toml", ["seed=3"])
    assert (recipe.name, recipe.train.steps, recipe.train.seed) == ("mine", 5, 3)
    assert recipe.model == Recipe().model


def test_a_recorded_recipe_comes_back_equal() -> None:
    recipe = load_recipe(None, ["betas=[0.8, 0.9]", "data.mixture.code=2", "model.router_options.normalize=false"])
    assert recorded_recipe(json.loads(recipe.model_dump_json()), "run.json") == recipe


def test_differences_name_the_keys_and_leave_out_the_harmless_ones() -> None:
    harmless = ["name=other", "eval_every=5", "eval_tokens=6", "save_every=7", "keep=8"]
    harmless += ["strategy=hybrid", "overlap=2", "exchange=direct", "timeout=9"]
    changed = load_recipe(None, [*harmless, "steps=9", "model.balancing={}"])
    assert {word.split("=")[0] for word in harmless} == {key.split(".")[-1] for key in HARMLESS}
    assert changed.differences(load_recipe()) == [
        "model.balancing ({'load_balancing': 0.01} then, {} now)",
        f"train.steps ({load_recipe().train.steps} then, 9 now)",
    ]
    assert Recipe().differences(Recipe()) == []


def test_no_two_sections_share_a_key() -> None:
    names = [key.split(".")[-1] for key in Recipe.known_keys()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", sorted(Recipe.known_keys()))
def test_every_key_is_described(key: str) -> None:
    field = Recipe.known_keys()[key]
    assert field.description
    assert allowed(field)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.steps = 3  # type: ignore[misc]
