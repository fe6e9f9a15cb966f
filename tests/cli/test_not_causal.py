"""A model whose router looks at later tokens: measured with a warning, and refused where text would be generated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.train import tiny
from transformers import AutoTokenizer

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.cli.main import run

Captured = pytest.CaptureFixture[str]
NOT_CAUSAL = "the router 'expert_choice' is not causal: a token's experts depend on all tokens of the batch"


@pytest.fixture(scope="module")
def model(models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("not causal") / "model"
    settings = json.loads((models / "ours" / "config.json").read_text())
    settings |= {"router": "expert_choice", "num_experts_per_tok": 4}
    torch.manual_seed(0)
    MoesaicForCausalLM(MoesaicConfig.from_dict(settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models / "ours").save_pretrained(folder)
    return str(folder)


def test_eval_says_so(model: str, texts: list[str], capsys: Captured) -> None:
    assert run(["eval", model, *texts, "--json"]) == 0
    told = capsys.readouterr()
    assert f"warning: the figures are not those of a model that writes text: {NOT_CAUSAL}" in told.err
    assert json.loads(told.out)["not_causal"].startswith(NOT_CAUSAL)


def test_eval_of_others_does_not(models: Path, texts: list[str], capsys: Captured) -> None:
    for kind in ("ours", "dense"):
        assert run(["eval", str(models / kind), *texts, "--json"]) == 0
        told = capsys.readouterr()
        assert "warning" not in told.err
        assert json.loads(told.out)["not_causal"] == ""


def test_generate_serve_and_batch_refuse(model: str, tmp_path: Path, capsys: Captured) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps({"prompt": "def f(x):", "max_tokens": 2}) + "\n")
    for words in (
        ["generate", model, "--prompt", "def add"],
        ["serve", model, "--port", "0"],
        ["batch", str(requests), "--model", model, "--out", str(tmp_path / "out.jsonl")],
    ):
        assert run(words) == 2, words
        out, error = capsys.readouterr()
        assert out == ""  # not even the prompt
        assert f"text cannot be generated: {NOT_CAUSAL}" in error
        assert "Traceback" not in error


def test_train_says_so(tmp_path: Path, capsys: Captured) -> None:
    from moesaic.train.run import train

    display = tiny.AtStep()
    recipe = tiny.recipe(
        tiny.write_corpus(tmp_path),
        "model.router=expert_choice",
        "model.top_k=4",
        "train.steps=3",
        "train.save_every=0",
    )
    train(recipe, tmp_path / "run", display=display)
    assert [line for line in display.said if NOT_CAUSAL in line]
    assert "NotCausalWarning" not in capsys.readouterr().err
