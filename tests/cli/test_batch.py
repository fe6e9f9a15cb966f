"""``moesaic batch`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import AdapterLayer, Base, write_adapter
from moesaic.cli.main import run
from moesaic.experts import ExpertBank
from moesaic.hf.load import load_model
from moesaic.serve import offline

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": f"def f{place}(x):", "max_tokens": 5, "temperature": 0} for place in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(path: Path) -> dict[str, str]:
    results = map(json.loads, path.read_text().splitlines())
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in results}


@pytest.mark.parametrize("kind", ["ours", "mixtral", "dense"])
def test_results_are_what_generate_says(kind: str, models: Path, file: Path, tmp_path: Path, capsys: Captured) -> None:
    model, out = str(models / kind), tmp_path / "out.jsonl"
    assert run(["batch", str(file), "--model", model, "--out", str(out), "--kv-gib", "0.01"]) == 0
    assert capsys.readouterr().out.startswith(f"3 results in {out}\n")
    words = ["generate", model, "--prompt", "def f1(x):", "--max-new-tokens", "5", "--temperature", "0", "--json"]
    assert run(words) == 0
    assert texts(out)["line-2"] == json.loads(capsys.readouterr().out)["text"]


def test_what_is_done_is_not_done_again(models: Path, file: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out.jsonl"
    words = ["batch", str(file), "--model", str(models / "dense"), "--out", str(out), "--json"]
    assert run(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["requests"], told["found"], told["done"]) == (3, 0, 3)
    assert told["new_tokens"] >= 3 and told["prompt_tokens"] > 10 and told["seconds"] > 0
    kept = out.read_text().splitlines(keepends=True)
    out.write_text(kept[0])
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 1
    assert out.read_text().startswith(kept[0]) and len(out.read_text().splitlines()) == 3
    assert run(words[:-1]) == 0
    assert capsys.readouterr().out == f"3 results in {out} (3 had theirs already)\n"


def test_a_request_names_its_adapter(models: Path, tmp_path: Path, capsys: Captured) -> None:
    model, _ = load_model(models / "ours")
    layers, tensors = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertBank):
            layers[name] = AdapterLayer([0, 1, 2, 3], [1.0] * 4, 4)
            tensors[name] = {key: -3 * tensor.detach() for key, tensor in module.named_parameters()}
    base = Base(fingerprint(model), model.config.model_type, "ours")
    write_adapter(tmp_path / "poet", base, layers, tensors)
    lines = [{"prompt": "def f(x):", "max_tokens": 8, "temperature": 0, "model": name} for name in ("ours", "poet")]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["batch", str(file), "--model", str(models / "ours"), "--out", str(out)]
    assert run([*words, "--adapter", f"poet={tmp_path / 'poet'}"]) == 0
    assert len(set(texts(out).values())) == 2
    assert run(words) == 2
    assert "line 2: there is no model 'poet'; given: ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "fp8"], "unknown --dtype 'fp8'"),
        (["--adapter", "poet"], "--adapter 'poet': write name=path"),
        (["--adapter", "a=nowhere"], "--adapter 'a': there is no folder at 'nowhere'"),
        (["--max-context", "4"], "line 1: the prompt has"),
        (["--model", "nowhere"], "there is no model folder at 'nowhere'"),
    ],
    ids=str,
)
def test_wrong_usage_is_told_in_a_line(
    words: list[str], message: str, models: Path, file: Path, tmp_path: Path, capsys: Captured
) -> None:
    usual = ["batch", str(file), "--model", str(models / "ours"), "--out", str(tmp_path / "out.jsonl")]
    assert run([*usual, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_folder_that_is_not_there_is_told(models: Path, file: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "none" / "out.jsonl"
    assert run(["batch", str(file), "--model", str(models / "ours"), "--out", str(out)]) == 1
    assert str(out) in capsys.readouterr().err


def test_weights_are_taken_in_the_type_asked_for(models: Path, file: Path, tmp_path: Path) -> None:
    seen = []
    made = offline.Engine.__init__

    def recording(self, model, *rest):  # type: ignore[no-untyped-def]
        seen.append(model.dtype)
        made(self, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline.Engine, "__init__", recording)
        words = ["batch", str(file), "--model", str(models / "ours"), "--out", str(tmp_path / "out.jsonl")]
        assert run([*words, "--dtype", "bf16"]) == 0
    assert seen == [torch.bfloat16]
