"""Runs of routers that draw: noise is repeatable, goes on where it stopped, and is each rank's own."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parallel import harness
from tests.train import tiny

from moesaic.errors import Interrupted
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import recorded_recipe
from moesaic.train.run import train

NOISY = ["model.router=noisy_topk", "model.balancing={importance=0.1, load=0.1}", "accumulation=2"]


@pytest.fixture(scope="module", autouse=True)
def pools() -> Iterator[None]:
    with harness.pools_stopped_at_end():
        yield


@pytest.mark.parametrize("words", [NOISY, ["model.router=hash"]], ids=["noise", "hash"])
def test_a_stopped_run_goes_on_with_the_same_numbers(words: list[str], corpus: list[str], tmp_path: Path) -> None:
    recipe = tiny.recipe(corpus, *words)
    train(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", display=tiny.AtStep(6, tiny.send(signal.SIGINT)))
    torch.manual_seed(99)
    train(recipe, tmp_path / "run", resume=True)
    assert tiny.losses(tmp_path / "run") == tiny.losses(tmp_path / "straight")


def test_recomputed_layers_change_no_number(corpus: list[str], tmp_path: Path) -> None:
    for name, more in (("plain", []), ("recomputed", ["gradient_checkpointing=true"])):
        train(tiny.recipe(corpus, *NOISY, "steps=4", *more), tmp_path / name)
    plain, recomputed = (tiny.losses(tmp_path / name) for name in ("plain", "recomputed"))
    for step, values in plain.items():
        assert recomputed[step] == pytest.approx(values, rel=1e-5), f"step {step}"


def on_rank(recipe: str, out: str) -> tuple[dict[int, Any], float]:
    """What the run logged, and a number that the rank draws next."""
    train(recorded_recipe(json.loads(recipe), "the test"), out)
    return tiny.losses(Path(out)), float(torch.rand(()))


def test_each_rank_has_noise_of_its_own_and_the_same_each_time(corpus: list[str], tmp_path: Path) -> None:
    recipe: Recipe = tiny.recipe(
        corpus, *NOISY, "batch_size=8", "steps=3", "strategy=tokens", "overlap=1", "exchange=direct"
    )
    runs = [harness.pool(2).run(on_rank, recipe.model_dump_json(), str(tmp_path / name)) for name in ("one", "two")]
    (losses, first), (_, second) = runs[0]
    assert first != second
    assert [drawn for _, drawn in runs[1]] == [first, second]
    for step, values in losses.items():
        assert runs[1][0][0][step] == pytest.approx(values, rel=1e-5), f"step {step}"
