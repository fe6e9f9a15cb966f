"""``moesaic inspect`` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.cli.main import run
from moesaic.data import Document, load_corpus, split_corpus, train_tokenizer
from moesaic.inspect import RoutingTrace

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CODE = "def add(x, y):\n    return x + y\n" * 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([Document("code", "a.py", CODE)], 290)
    ours = MoesaicConfig(**SIZES, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    for name, model in {
        "ours": MoesaicForCausalLM(ours),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
        "dense": LlamaForCausalLM(LlamaConfig(**SIZES)),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.txt").write_text("It was a bright cold day in April. " * 20)
    monkeypatch.chdir(tmp_path)
    return ["--data", "code=a.py", "-d", "prose=b.txt"]


@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_a_report(name: str, models: Path, data: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["inspect", str(models / name), *data, "--tokens", "200"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / f"{name}-report"
    assert str(folder / "index.html") in printed
    report = json.loads((folder / "report.json").read_text())
    for finding in report["findings"]:
        assert finding["text"] in printed
    assert report["model"]["name"] == name
    # The models take 64 tokens at most: two passages a domain.
    domains = [{"name": name, "tokens": 100, "passages": 2} for name in ("code", "prose")]
    assert report["data"] == {"tokens": 200, "domains": domains}


def test_json(models: Path, data: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["inspect", str(models / "ours"), *data, "--tokens", "60", "--out", "out", "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "out")
    assert told["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert told["report"] == json.loads((tmp_path / "out" / "report.json").read_text())
    assert run(arguments) == 0  # replaces its own earlier report


def test_a_run_is_inspected_on_what_it_held_out(
    models: Path, data: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"# file number {i}\n{CODE}")
    shutil.copytree(models / "ours", tmp_path / "my-run" / "model")
    recipe = {"name": "r", "data": {"sources": [f"own={texts}"], "validation_fraction": 0.3}}
    (tmp_path / "my-run" / "run.json").write_text(json.dumps({"recipe": recipe, "status": "finished"}))
    assert run(["inspect", "my-run", "--tokens", "100000"]) == 0
    report = json.loads((tmp_path / "my-run" / "report" / "report.json").read_text())
    assert report["model"]["name"] == "my-run"
    assert [domain["name"] for domain in report["data"]["domains"]] == ["own"]
    trace = RoutingTrace.load(tmp_path / "my-run" / "report" / "trace.npz")
    held_out = split_corpus(load_corpus([f"own={texts}"]), 0.3)[1]
    assert {passage.document for passage in trace.passages} == {document.name for document in held_out}


def test_unreadable_files_are_named(
    models: Path, data: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "good.txt").write_text(CODE)
    (tmp_path / "texts" / "bad.txt").write_bytes(b"\x00\xff\x00\xfe" * 50)
    assert run(["inspect", str(models / "ours"), "--data", "texts", "--tokens", "40"]) == 0
    assert "bad.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "LlamaForCausalLM has no MoE layer"),
        (["nothing"], "no model folder"),
        (["ours", "--tokens", "0"], "at least 1"),
        (["ours", "--out", "a.py"], "that is a file"),
        (["ours", "--out", "."], "it holds other files"),
        (["ours", "--data", "missing.txt"], "does not exist"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    models: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    name, *options = arguments
    assert run(["inspect", str(models / name), *data, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
