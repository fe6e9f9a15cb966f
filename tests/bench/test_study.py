"""The routing study: its recipes, how they are measured, its runs, and the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests.train import tiny

from moesaic.bench.study import runs
from moesaic.bench.study.entries import Entry, chosen, load_entries
from moesaic.bench.study.figures import LINE
from moesaic.bench.study.measure import measure_routing
from moesaic.bench.study.runs import Task, run_all, tasks, work
from moesaic.bench.study.speed import measure_speed, middle, ratio
from moesaic.errors import ConfigError, Interrupted
from moesaic.layer import moe_layers
from moesaic.train.model import build_model, check
from moesaic.train.recipe_file import load_recipe, override

ROOT = Path(__file__).parents[2]
RECIPES, TABLE = ROOT / "recipes" / "routing", ROOT / "benchmarks" / "routing.toml"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
# What may differ between two recipes: the routing, and how it is balanced.
FREE = {
    *("name", "train.accumulation", "model.d_ff", "model.num_experts", "model.top_k", "model.router"),
    *("model.router_options", "model.balancing", "model.capacity_factor", "model.zero_computation_experts"),
    *("model.iterations", "model.expert_d_ffs", "model.communication_width", "model.pre_gating", "model.capacity_tau"),
    *("model.num_shared_experts", "model.shared_d_ff"),
}
SMALL = [
    *["model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.max_length=64", "data.vocab_size=300"],
    *["data.sequence_length=16", "data.validation_fraction=0.2", "train.eval_tokens=64", "train.precision=fp32"],
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


def small(corpus: Sequence[str], name: str, *words: str) -> Entry:
    """A recipe of the study on a tiny corpus, narrow, two steps."""
    recipe = load_recipe(RECIPES / f"{name}.toml")
    return Entry(name, override(recipe, [f"data.sources={list(corpus)}", *SMALL, "train.steps=2", *words]), name)


# The recipes


def test_every_recipe_stands_in_the_table() -> None:
    entries = load_entries(RECIPES, TABLE)
    assert sorted(entries) == NAMES
    assert set(LINE) <= set(NAMES)
    for entry in entries.values():
        assert entry.title
        assert entry.held or not entry.claims


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_differs_from_the_baseline_in_its_routing_only(name: str) -> None:
    recipe, baseline = (load_recipe(RECIPES / f"{each}.toml") for each in (name, "softmax"))
    check(recipe)
    assert recipe.name == f"routing-{name}"
    theirs = baseline.flat()
    assert {key for key, value in recipe.flat().items() if value != theirs[key]} <= FREE


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_is_measured(name: str, corpus: list[str], tmp_path: Path) -> None:
    found = work(Task(small(corpus, name), 0, tmp_path / "run"))
    assert all(math.isfinite(domain["loss"]) for domain in found["validation"].values())
    assert sorted(found["experts"]) == ["sums", "words"]
    assert 0 < found["active_parameters"] <= 3 * found["parameters"]


def write_table(path: Path, **sections: str) -> Path:
    path.write_text("".join(f"[{name}]\n{text}\n" for name, text in sections.items()))
    return path


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"softmax": "title = 'a'\nclaims = []", "gone": "title = 'b'\nclaims = []"}, "'gone' must be both a recipe"),
        ({"softmax": "title = 'a'\nclaims = ['qualty']"}, "did you mean 'quality'"),
        ({"softmax": "title = 'a'\nclaims = ['quality']\nagainst = 'sofmax'"}, "did you mean 'softmax'"),
        ({"softmax": "title = 'a'\nclaims = []\nverdict = 'perhaps'"}, "yes, no, unclear"),
    ],
)
def test_a_mistake_in_the_table_is_explained(sections: dict[str, str], error: str, tmp_path: Path) -> None:
    (tmp_path / "softmax.toml").write_text((RECIPES / "softmax.toml").read_text())
    (tmp_path / "tables").mkdir()
    with pytest.raises(ConfigError, match=error):
        load_entries(tmp_path, write_table(tmp_path / "tables" / "table.toml", **sections))


def test_names_are_chosen_in_the_order_of_the_table() -> None:
    entries = {name: Entry(name, load_recipe(), name) for name in ("b", "a", "c")}
    assert list(chosen(entries, [])) == ["b", "a", "c"]
    assert list(chosen(entries, ["c", "b"])) == ["b", "c"]
    with pytest.raises(ConfigError, match="unknown recipe 'd'"):
        chosen(entries, ["d"])


# Measuring


@pytest.mark.parametrize("name", ["softmax_top3", "top_p", "moepp", "unequal", "chain", "bigmac"])
def test_the_routing_is_counted_by_domain(name: str, corpus: list[str]) -> None:
    """Against loops over windows, layers, iterations and slots."""
    recipe = small(corpus, name).recipe
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU).eval()
    found = measure_routing(model, data.validation, sequence_length=16, batch_size=4, precision="fp32", max_tokens=64)
    layers, c = moe_layers(model), moe_layers(model)[0].config
    widths = c.expert_d_ffs or [c.d_ff] * c.num_experts
    slots, met = {"sums": [0, 0], "words": [0, 0]}, 0
    loads_DLE = np.zeros((2, len(layers), c.num_experts))
    for d, domain in enumerate(slots):
        ids = data.validation[domain]
        starts = [number * ((len(ids) - 1) // 16) // 4 * 16 for number in range(4)]
        rows = torch.tensor(np.stack([ids[at : at + 16] for at in starts]).astype(np.int64))
        with torch.no_grad():
            model(input_ids=rows, use_cache=False)
        for number, layer in enumerate(layers):
            for expert in [int(slot) for routing in layer.last_routings for slot in routing.expert_ids.flatten()]:
                if expert < c.num_experts:
                    slots[domain][0] += 1
                    met += 3 * (c.communication_width or c.d_model) * widths[expert]
                    loads_DLE[d, number, expert] += 1
                elif expert < c.num_choices:
                    slots[domain][1] += 1
    assert found["experts"] == pytest.approx({domain: each[0] / 64 / 2 for domain, each in slots.items()})
    assert found["zero"] == pytest.approx({domain: each[1] / 64 / 2 for domain, each in slots.items()})
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for layer in layers for parameter in layer.experts.parameters())
    assert found["active_parameters"] == pytest.approx(total - routed + met / 128)
    mean_LE = (loads_DLE / loads_DLE.sum(axis=-1, keepdims=True)).mean(axis=0)
    assert found["imbalance"] == pytest.approx(np.mean(mean_LE.max(1) / mean_LE.mean(1)))
    assert 0 <= found["specialization"] <= 1


def test_speed_takes_turns_and_leaves_the_weights(corpus: list[str], tmp_path: Path) -> None:
    pair = [Task(small(corpus, name), 0, tmp_path / name) for name in ("softmax", "sigmoid")]
    for task in pair:
        work(task)
    rates = measure_speed(pair, rounds=2)
    assert {name: {kind: len(each) for kind, each in kinds.items()} for name, kinds in rates.items()} == {
        name: {"training": 2, "forward": 2} for name in ("softmax", "sigmoid")
    }
    assert all(value > 0 for kinds in rates.values() for each in kinds.values() for value in each)
    assert middle({"forward": [1.0, 5.0, 2.0]}) == {"forward": 2.0}
    assert ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0, 2.5))


# Running


def losses(told: dict[str, Any]) -> list[float]:
    return [domain["loss"] for domain in told["validation"].values()]


def test_an_interrupted_run_goes_on_and_a_finished_one_is_not_repeated(corpus: list[str], tmp_path: Path) -> None:
    entry = small(corpus, "softmax", "train.steps=6")
    whole, parted = (Task(entry, 0, tmp_path / name) for name in ("whole", "parted"))
    assert whole.result() is None
    work(whole)
    with pytest.raises(Interrupted):
        work(parted, tiny.AtStep(3, tiny.send(signal.SIGINT)))
    assert parted.result() is None
    again = tiny.AtStep()
    work(parted, again)
    assert "going on after step 3" in again.said
    results = [task.result() for task in (whole, parted)]
    assert results[0] and results[1] and losses(results[0]) == losses(results[1])
    # Three times the weights are not kept, sixty-nine times.
    assert not (parted.folder / "checkpoints").exists()


def test_a_run_by_another_recipe_is_not_a_result(corpus: list[str], tmp_path: Path) -> None:
    entry = small(corpus, "softmax")
    work(Task(entry, 0, tmp_path / "run"))
    other = dataclasses.replace(entry, recipe=override(entry.recipe, ["model.top_k=1"]))
    for changed in (Task(other, 0, tmp_path / "run"), Task(entry, 1, tmp_path / "run"), Task(entry, 0, tmp_path, 1)):
        assert changed.result() is None
    display = tiny.AtStep()
    found = work(Task(other, 0, tmp_path / "run"), display)
    assert not any("going on" in line for line in display.said)
    assert found["experts"] == {"sums": 1.0, "words": 1.0}
    (tmp_path / "run" / runs.RESULT).write_text("{")
    assert Task(other, 0, tmp_path / "run").result() is None


def test_steps_replace_those_of_the_recipe(corpus: list[str]) -> None:
    entry = small(corpus, "softmax", "train.warmup_steps=2")
    assert entry.run(3, None).train.steps == 2
    recipe = entry.run(3, 100)
    assert (recipe.train.steps, recipe.train.seed, recipe.train.threads, recipe.train.warmup) == (100, 3, 1, 6)


def test_every_recipe_has_its_first_seed_before_any_has_its_second(corpus: list[str]) -> None:
    entries = [small(corpus, name) for name in ("softmax", "none")]
    assert [task.name for task in tasks(entries, [0, 1], Path("x"))] == ["softmax-0", "none-0", "softmax-1", "none-1"]


def stub(code: str) -> Callable[[Task], list[str]]:
    """A process in place of a run's; it knows the task's folder and name."""
    return lambda task: [sys.executable, "-c", code, str(task.folder), task.name, json.dumps(task.recipe.flat())]


WRITES = """
import json, pathlib, sys
folder, name, recipe = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
if name == "none-0": sys.exit("it is broken")
folder.mkdir()
told = {"recipe": recipe, "validation": {"code": {"loss": 4.0}}, "experts": {"code": 2.0}}
(folder / "study.json").write_text(json.dumps(told))
"""


def test_the_pool_does_all_and_names_what_failed(corpus: list[str], tmp_path: Path) -> None:
    todo = tasks([small(corpus, name) for name in ("softmax", "none", "sigmoid")], [0], tmp_path)
    said: list[str] = []
    failed = run_all(todo, 2, stub(WRITES), said.append)
    assert [task.name for task in failed] == ["none-0"]
    assert [task.name for task in todo if task.result()] == ["softmax-0", "sigmoid-0"]
    assert len(said) == 3
    assert any(line.startswith("none-0: failed (1): it is broken; all of it in ") for line in said)
    assert any(line.startswith("softmax-0: loss code 4.000; 2.00 experts a token (") for line in said)


WAITS = """
import pathlib, signal, sys
def end(number, frame): (folder / "saved").touch(); sys.exit(130)
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
signal.signal(signal.SIGINT, end)
(folder / "ready").touch()
while True: signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_ones_save_and_starts_no_more(
    number: signal.Signals, corpus: list[str], tmp_path: Path
) -> None:
    todo = tasks([small(corpus, name) for name in ("softmax", "none", "sigmoid")], [0], tmp_path)
    before = signal.getsignal(number)

    def interrupt() -> None:
        while not all((task.folder / "ready").exists() for task in todo[:2]):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), number)

    waiter = threading.Thread(target=interrupt)
    waiter.start()
    with pytest.raises(Interrupted, match="goes on from there"):
        run_all(todo, 2, stub(WAITS), lambda line: None)
    waiter.join()
    assert [(task.folder / "saved").exists() for task in todo] == [True, True, False]
    assert signal.getsignal(number) is before


# The command


@pytest.fixture
def command(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with two tiny recipes, a table and a page of its own; its runs are in this process."""
    spec = importlib.util.spec_from_file_location("routing_study", ROOT / "benchmarks" / "routing.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries = {
        "softmax": dataclasses.replace(small(corpus, "softmax"), sentence="The baseline."),
        "none": dataclasses.replace(small(corpus, "none"), claims=("worse",), against="softmax", held="all"),
    }
    done: list[str] = []

    def run_here(todo: Sequence[Task], jobs: int, command: Any, say: Callable[[str], None]) -> list[Task]:
        done.extend(task.name for task in todo)
        for task in todo:
            work(task)
        return []

    page = tmp_path / "docs" / "routing.md"
    page.parent.mkdir()
    page.write_text("# Title\n<!-- results: made by benchmarks/routing.py -->\nold\n<!-- end of results -->\nend\n")
    module.__dict__.update(PAGE=page, PICTURE=page.parent / "assets" / "routing.png", done=done)
    monkeypatch.setattr(module, "load_entries", lambda *_: entries)
    monkeypatch.setattr(module, "run_all", run_here)
    monkeypatch.setattr(module, "measure_speed", lambda tasks, say: {task.entry.name: FLAT for task in tasks})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESAIC_TUNE", "off")
    return module


FLAT = {"training": [1.0, 1.0], "forward": [3.0, 3.0]}


def test_the_whole_study_writes_the_page_once_all_is_there(command: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "routing.md"
    assert command.main(["--only", "softmax"]) == 0
    assert command.done == ["softmax-0", "softmax-1", "softmax-2"]
    assert "old" in page.read_text()
    assert "[softmax](#softmax)" in (tmp_path / "runs" / "routing" / "routing.md").read_text()
    assert command.main([]) == 1  # no sentence on "none"
    assert command.done[3:] == ["none-0", "none-1", "none-2"]
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("<!-- end of results -->\nend\n")
    assert "[none](#none)" in text
    assert (tmp_path / "docs" / "assets" / "routing.png").exists()
    # Nothing is done again, and the page alone does nothing at all.
    assert command.main([]) == 1
    assert command.main(["--page"]) == 1
    assert len(command.done) == 6
    assert page.read_text() == text


def test_a_quick_look_leaves_the_page_and_the_long_runs_alone(command: ModuleType, tmp_path: Path) -> None:
    command.main(["--steps", "1", "--seeds", "0"])
    assert command.done == ["softmax-0", "none-0"]
    assert "old" in (tmp_path / "docs" / "routing.md").read_text()
    assert sorted(path.name for path in (tmp_path / "runs" / "routing").iterdir()) == ["steps-1"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--only", "sotfmax"], "did you mean 'softmax'"),
        (["--seeds", "a"], "whole numbers"),
        (["--jobs", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_wrong_usage_ends_with_two(
    words: list[str], error: str, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    assert error in capsys.readouterr().err
    assert command.done == []


def test_a_page_of_nothing_is_not_written(command: ModuleType) -> None:
    assert command.main(["--page"]) == 1


def test_a_process_of_the_pool_does_one_run(command: ModuleType, tmp_path: Path) -> None:
    assert command.main(["--run", "softmax-1", "--out", str(tmp_path / "there")]) == 0
    told = json.loads((tmp_path / "there" / "softmax-1" / "study.json").read_text())
    assert told["recipe"]["train.seed"] == 1
    task = Task(command.load_entries()["softmax"], 1, tmp_path / "there" / "softmax-1", 7)
    words = command._command(task)
    assert words[-6:] == ["--run", "softmax-1", "--out", str(tmp_path / "there"), "--steps", "7"]
    help_text = subprocess.run([*words[3:5], "--help"], capture_output=True, text=True, check=True).stdout
    assert "--jobs" in help_text
