"""Validation against a calculation of its own, and its manners."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train import tiny
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moesaic.cli import main
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.layer import moe_layers
from moesaic.train.evaluate import bytes_per_token, evaluate
from moesaic.train.evaluation import evaluate_folder
from moesaic.train.model import build_model
from moesaic.train.recipe import Recipe
from moesaic.train.run import train

TOKENS = {"a": np.arange(1, 51, dtype=np.uint16) % 40, "b": np.arange(35, dtype=np.uint32)[::-1] % 7}


@pytest.fixture
def model(recipe: Recipe) -> torch.nn.Module:
    data = tiny.data_of(recipe)
    return build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)


def by_hand(model: torch.nn.Module, tokens: np.ndarray, length: int) -> tuple[float, int]:
    """Mean loss over whole windows, one token at a time."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - length, length):
        window = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1]).logits[0].double()
        for position in range(length):
            row = logits[position]
            total += float(torch.log(torch.exp(row).sum()) - row[window[position + 1]])
            count += 1
    return total / count, count


def test_it_is_the_mean_loss_over_whole_windows(model: torch.nn.Module) -> None:
    results = evaluate(model, TOKENS, sequence_length=16, batch_size=2)
    for name, tokens in TOKENS.items():
        loss, count = by_hand(model.eval(), tokens, 16)
        assert results[name].loss == pytest.approx(loss, rel=1e-6)
        assert results[name].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert results[name].tokens == count
        assert results[name].bits_per_byte is None
    assert (results["a"].tokens, results["b"].tokens) == (48, 32)


def test_it_is_deterministic_and_the_batch_size_does_not_matter(model: torch.nn.Module) -> None:
    first = evaluate(model, TOKENS, sequence_length=8, batch_size=3)
    assert evaluate(model, TOKENS, sequence_length=8, batch_size=3) == first
    assert evaluate(model, TOKENS, sequence_length=8, batch_size=1)["a"].loss == pytest.approx(
        first["a"].loss, rel=1e-6
    )


def test_bits_per_byte_share_out_the_loss(model: torch.nn.Module) -> None:
    result = evaluate(model, TOKENS, sequence_length=8, bytes_per_token={"a": 2.5})
    assert result["a"].bits_per_byte == pytest.approx(result["a"].loss / math.log(2) / 2.5)
    assert result["b"].bits_per_byte is None


def test_bytes_per_token_are_the_domains_own(recipe: Recipe) -> None:
    data = tiny.data_of(recipe)
    words = bytes_per_token(data)["words"]
    text = data.tokenizer.decode(data.validation["words"])
    assert words * len(data.validation["words"]) == len(text.replace("<|endoftext|>", "").encode())


def test_it_may_stop_early(model: torch.nn.Module) -> None:
    assert evaluate(model, TOKENS, sequence_length=8, max_tokens=17)["a"].tokens == 16
    assert evaluate(model, TOKENS, sequence_length=8, max_tokens=1)["a"].tokens == 8


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: torch.nn.Module, training: bool) -> None:
    model.train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    evaluate(model, TOKENS, sequence_length=8)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not layer.slot_counts.any() for layer in moe_layers(model))


def test_the_mode_comes_back_after_an_error(model: torch.nn.Module) -> None:
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, {"a": np.full(20, 1000)}, sequence_length=8)
    assert model.training


def test_bf16_is_close(model: torch.nn.Module) -> None:
    exact = evaluate(model, TOKENS, sequence_length=16)["a"].loss
    close = evaluate(model, TOKENS, sequence_length=16, precision="bf16")["a"].loss
    assert close != exact
    assert close == pytest.approx(exact, rel=2e-2)


def test_a_model_of_transformers_is_measured_alike() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    loss, _ = by_hand(model, TOKENS["a"], 12)
    assert evaluate(model, TOKENS, sequence_length=12)["a"].loss == pytest.approx(loss, rel=1e-6)


def test_bad_requests_are_explained(model: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="precision is 'fp8': it must be one of fp32, bf16"):
        evaluate(model, TOKENS, sequence_length=8, precision="fp8")
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        evaluate(model, TOKENS, sequence_length=8, max_tokens=0)
    with pytest.raises(ConfigError, match="batch_size is 0: it must be at least 1"):
        evaluate(model, TOKENS, sequence_length=8, batch_size=0)
    with pytest.raises(DataError, match="35 tokens"):
        evaluate(model, TOKENS, sequence_length=40)
    with pytest.raises(ConfigError, match="sequence_length is 65: it must be at most 64"):
        evaluate(model, {"a": np.arange(400) % 40}, sequence_length=65)
    assert evaluate(model, {"a": np.arange(400) % 40}, sequence_length=64)["a"].tokens == 384


def test_learned_positions_end_where_the_model_says() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    assert evaluate(model, TOKENS, sequence_length=16)["b"].tokens == 32
    with pytest.raises(ConfigError, match="sequence_length is 17: it must be at most 16"):
        evaluate(model, TOKENS, sequence_length=17)


@pytest.fixture(scope="module")
def run(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny.recipe(corpus, "eval_tokens=0", "steps=3"), folder)
    return folder


def test_a_run_is_measured_as_it_measured_itself(run: Path) -> None:
    report = evaluate_folder(run)
    recorded = json.loads((run / "run.json").read_text())["results"]["after"]
    assert (report.model, report.split, report.sequence_length) == (str(run), "validation", 16)
    assert {name: result.loss for name, result in report.domains.items()} == pytest.approx(
        {name: result["loss"] for name, result in recorded.items()}, rel=1e-6
    )
    assert report.domains["words"].bits_per_byte == pytest.approx(recorded["words"]["bits_per_byte"], rel=1e-6)


@pytest.fixture
def relative_run(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run on text of its own, ``txt``, which was named from the folder above it."""
    shutil.copytree(corpus[0].partition("=")[2], tmp_path / "a/txt")
    monkeypatch.chdir(tmp_path / "a")
    train(tiny.recipe(["words=txt"], "eval_tokens=0", "steps=3"), tmp_path / "a/run")
    return tmp_path / "a/run"


def test_a_run_measured_from_another_folder_uses_its_own_text(
    relative_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b/txt").mkdir(parents=True)
    (tmp_path / "b/txt/other.txt").write_text("9 8 7 " * 900)
    monkeypatch.chdir(tmp_path / "b")
    report = evaluate_folder("../a/run")
    recorded = json.loads((relative_run / "run.json").read_text())["results"]["after"]
    assert report.domains["words"].loss == pytest.approx(recorded["words"]["loss"], rel=1e-6)
    assert not report.text_changed


def test_text_that_changed_since_training_is_pointed_out(
    relative_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a/txt/0.txt").write_text("something else " * 200)
    (tmp_path / "a/txt/broken.txt").write_bytes(b"\0\1")
    report = evaluate_folder(relative_run)
    assert report.text_changed
    assert [(Path(skip.path).name, skip.count) for skip in report.skipped] == [("broken.txt", 1)]
    assert not evaluate_folder(relative_run, sources=[str(tmp_path / "a/txt")]).text_changed
    assert main.run(["eval", str(relative_run), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert (told["text_changed"], told["skipped"][0]["reason"]) == (True, report.skipped[0].reason)
    assert f"warning: the text has changed since {relative_run} was trained on it" in captured.err
    assert f"skipped 1 that could not be read, such as {report.skipped[0].path}: binary" in captured.err


def test_given_text_is_measured_as_a_whole(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("the cat sat on a mat and some dog looked " * 50)
    report = evaluate_folder(run / "model", sources=[str(tmp_path / "mine.txt")], sequence_length=10)
    assert report.split == "all"
    whole = report.domains["mine"].tokens
    held_out = evaluate_folder(run, sources=[str(tmp_path / "mine.txt")], sequence_length=10, split="validation")
    assert held_out.domains["mine"].tokens < whole / 4  # a fifth is held out


def test_the_window_is_what_the_model_and_the_text_allow(run: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the cat sat on a mat and some dog looked " * 50)
    (tmp_path / "short.txt").write_text("the cat sat")
    assert evaluate_folder(run / "model", sources=[str(tmp_path / "long.txt")]).sequence_length == 64
    assert evaluate_folder(run / "model", sources=[str(tmp_path / "short.txt")]).sequence_length < 16


def test_a_wrong_split_or_a_damaged_note_is_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split is 'test': it must be one of validation, all"):
        evaluate_folder(run, split="test")
    (tmp_path / "model").symlink_to(run / "model")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json' cannot be read"):
        evaluate_folder(tmp_path)
