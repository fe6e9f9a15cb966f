"""``moesaic place`` from the command line, from a trace to a placed model that is inspected again."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.conftest import CODE, PROSE
from tests.inspect.traces import made_up_trace

from moesaic.cli.main import run
from moesaic.cli.place import _little, _told, command
from moesaic.hf.load import load_model
from moesaic.inspect import RoutingTrace, inspect_folder
from moesaic.inspect.placement import held_out_tokens
from moesaic.parallel.placement.place import MAX_IMBALANCE, LayerRouting, Placement, place, traffic


@pytest.fixture(scope="module")
def reports(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with reports of both models."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "a.py").write_text(CODE)
    (folder / "b.txt").write_text(PROSE)
    for name in ("ours", "mixtral"):
        sources = [f"code={folder / 'a.py'}", f"prose={folder / 'b.txt'}"]
        inspect_folder(models / name, sources=sources, out=folder / f"{name}-report", max_tokens=400)
    return folder


@pytest.fixture
def traces(reports: Path, texts: list[str], tmp_path: Path) -> Path:
    """The current folder, with the texts and reports of both models."""
    for name in ("ours", "mixtral"):
        shutil.copytree(reports / f"{name}-report", tmp_path / f"{name}-report")
    return tmp_path


def routing(trace: RoutingTrace, tokens: Any) -> list[LayerRouting]:
    return [LayerRouting(layer.expert_ids[tokens], layer.num_experts) for layer in trace.layers]


@pytest.mark.parametrize(("name", "objective"), [("ours", "transitions"), ("mixtral", "rows")])
def test_the_placed_model_has_the_traffic_that_was_told(
    name: str, objective: str, models: Path, texts: list[str], traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["place", str(models / name), "--trace", f"{name}-report", "--ranks", "2", "--out", "placed", "--json"]
    assert run([*arguments, "--objective", objective]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == "placed"
    # Optimized on three quarters, as the function does it.
    trace = RoutingTrace.load(f"{name}-report/trace.npz")
    held_out = held_out_tokens(trace)
    assert told["tokens"] == {"optimized": int((~held_out).sum()), "held_out": int(held_out.sum())}
    solution = place(routing(trace, ~held_out), 2, objective=objective)
    assert [layer["rank_of_expert"] for layer in told["layers"]] == [
        each.tolist() for each in solution.placement.rank_of
    ]
    assert told["programs"][0]["is_optimal"]
    assert told["programs"][0]["value"] == solution.stages[0].value
    before, _ = load_model(models / name, device="cpu")
    after, _ = load_model("placed", device="cpu")
    ids = torch.arange(2, 50)[None]
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    # The placed model's own trace: its experts where they lie cost what the report promises.
    assert run(["inspect", "placed", *texts, "--tokens", "400"]) == 0
    measured = routing(RoutingTrace.load("placed-report/trace.npz"), held_out)
    assert [layer["after"] for layer in told["layers"]] == [
        pytest.approx(asdict(layer)) for layer in traffic(measured, Placement.contiguous(measured, 2))
    ]


def test_tables_for_people(models: Path, traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["place", str(models / "ours"), "--trace", "ours-report/trace.npz", "--ranks", "4"]
    assert run([*arguments, "--hosts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "between hosts" in printed
    assert "experts on hosts: " in printed
    assert "experts of host 1 on its ranks: " in printed
    assert "nothing written" in printed
    assert "→" in printed
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "between hosts" not in printed
    assert "HiGHS proves that this is the best" in printed
    assert "the limit of the imbalance, 1.2, holds on the text optimized on" in printed
    assert sorted(path.name for path in traces.iterdir()) == ["a.py", "b.txt", "mixtral-report", "ours-report"]


def test_a_gap_is_told() -> None:
    program = {
        "name": "experts on ranks",
        "objective": "transitions",
        "value": 0.5,
        "bound": 0.625,
        "gap": 0.125,
        "is_optimal": False,
    }
    assert _told({**program, "exact": False}) == (
        "experts on ranks: 50.0% of the transitions stay (of the text optimized on); too large to be solved exactly: "
        "none is better than 62.5%, a gap of 12.5%"
    )
    assert "not settled within the time" in _told({**program, "exact": True})
    by_rows = {**program, "objective": "rows", "value": 2.5, "bound": 2.5, "is_optimal": True, "exact": True}
    assert _told(by_rows) == (
        "experts on ranks: 2.50 ranks a token and layer (of the text optimized on); HiGHS proves that this is the best"
    )


def test_a_small_gain_is_told() -> None:
    def gain(objective: str, before: float | None, after: float | None) -> str | None:
        name = {"transitions": "crossing", "rows": "rows"}[objective]
        return _little({"objective": objective, "before": {name: before}, "after": {name: after}})

    told = gain("transitions", 0.5, 0.495)
    assert told is not None and told.startswith("little is gained: crossing on held-out text changes by -1.0%")
    told = gain("rows", 1.0, 1.25)
    assert told is not None and "rows on held-out text changes by +25.0%" in told
    assert gain("rows", 0.0, 0.0) is None  # nothing is sent as it is
    assert gain("transitions", 0.5, 0.4) is None
    assert gain("transitions", None, None) is None


def test_held_out_are_documents_else_passages_else_tokens() -> None:
    trace = made_up_trace(domains=("code", "prose"), passages_per_domain=4, tokens_per_passage=10)
    held_out = held_out_tokens(trace)
    assert {trace.passage_of(int(i)).document for i in np.flatnonzero(held_out)} == {
        "code/<b>3</b>.txt",
        "prose/<b>3</b>.txt",
    }
    assert held_out.sum() == 20
    passages = [replace(passage, domain="one", document="book") for passage in trace.passages]
    assert np.array_equal(held_out_tokens(replace(trace, passages=passages)), held_out)
    trace = made_up_trace(domains=("code",), passages_per_domain=1, tokens_per_passage=10)
    assert np.flatnonzero(held_out_tokens(trace)).tolist() == [8, 9]


def other_trace(path: str, *, keep: int = 2, **changes: Any) -> None:
    """The trace of our model, with layers that it does not have."""
    trace = RoutingTrace.load("ours-report/trace.npz")
    trace.layers = [replace(layer, **changes) for layer in trace.layers[:keep]]
    trace.save(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "mixtral-report", "--ranks", "2"], "it is of a MixtralForCausalLM, this is a MoesaicForCausalLM"),
        (["--trace", "layers.npz", "--ranks", "2"], "it has MoE layers 0, the model 0, 1"),
        (["--trace", "experts.npz", "--ranks", "2"], "its layer 0 has 6 experts, the model's 4"),
        (["--trace", "gone.npz", "--ranks", "2"], "cannot read the routing trace 'gone.npz'"),
        (["--trace", "a.py", "--ranks", "2"], "'a.py' is not a routing trace"),
        (["--trace", "ours-report", "--ranks", "0"], "ranks is 0: it must be at least 1"),
        (["--trace", "ours-report", "--ranks", "5"], "ranks is 5, but MoE layer 0 has 4 experts"),
        (["--trace", "ours-report", "--ranks", "4", "--hosts", "3"], "hosts is 3"),
        (["--trace", "ours-report", "--ranks", "2", "--seconds", "0"], "seconds is 0.0"),
        (["--trace", "ours-report", "--ranks", "2", "--objective", "row"], "did you mean 'rows'? allowed: rows, tra"),
        (["--trace", "ours-report", "--ranks", "2", "--imbalance", "0.5"], "imbalance is 0.5"),
        (["--trace", "ours-report", "--ranks", "2", "--out", "ours-report"], "'ours-report' exists already"),
        (["--ranks", "2"], "Missing option '--trace'"),
    ],
)
def test_what_cannot_be_placed_is_said_in_one_line(
    arguments: list[str], said: str, models: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_trace("layers.npz", keep=1)
    other_trace("experts.npz", num_experts=6)
    assert run(["place", str(models / "ours"), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_quantized_model_of_transformers_is_traced_and_placed(
    models: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(models / "mixtral"), "--to", "int8", "--out", "small"]) == 0
    assert run(["inspect", "small", "--data", "a.py", "--tokens", "200"]) == 0
    assert run(["place", "small", "--trace", "small-report", "--ranks", "2", "--out", "placed"]) == 0
    ids = torch.arange(2, 50)[None]
    before, after = (load_model(folder, device="cpu")[0] for folder in ("small", "placed"))
    assert before.is_quantized
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_a_dense_model_has_nothing_to_place(models: Path, traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["place", str(models / "dense"), "--trace", "ours-report", "--ranks", "2"]) == 2
    assert "no MoE layer that can be placed" in capsys.readouterr().err


def test_without_scipy(
    models: Path, traces: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(["place", str(models / "ours"), "--trace", "ours-report", "--ranks", "2", "--out", "placed"]) == 2
    assert "pip install 'moesaic[place]'" in capsys.readouterr().err
    assert not Path("placed").exists()


def test_the_default_is_that_of_the_function() -> None:
    assert inspect.signature(command).parameters["imbalance"].default == MAX_IMBALANCE
