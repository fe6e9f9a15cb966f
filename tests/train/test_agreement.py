"""Agreement with a parent, against a calculation in float64, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.cli import main
from moesaic.data import Document, train_tokenizer
from moesaic.errors import ConfigError
from moesaic.train.agreement import compare_logits, evaluate_against
from moesaic.train.evaluate import evaluate
from moesaic.train.evaluation import evaluate_folder

TOKENS = {"a": np.arange(1, 51, dtype=np.uint16) % 40, "b": np.arange(35, dtype=np.uint32)[::-1] % 7}
TEXT = "def add(x, y):\n    return x + y\n" * 20


def llama(seed: int, vocab_size: int = 300, positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def by_hand(model: torch.nn.Module, parent: torch.nn.Module, tokens: np.ndarray, length: int) -> tuple[float, float]:
    """Share of equal predictions, and mean KL(parent ‖ model), one token and one vocabulary entry at a time."""
    same, kl, count = 0, 0.0, 0
    for start in range(0, len(tokens) - length, length):
        window = torch.from_numpy(tokens[start : start + length].astype(np.int64))[None]
        with torch.no_grad():
            ours, theirs = (each.eval()(input_ids=window).logits[0].double().tolist() for each in (model, parent))
        for q_row, p_row in zip(ours, theirs, strict=True):
            q_sum, p_sum = sum(map(math.exp, q_row)), sum(map(math.exp, p_row))
            for q, p in zip(q_row, p_row, strict=True):
                kl += math.exp(p) / p_sum * ((p - math.log(p_sum)) - (q - math.log(q_sum)))
            same += q_row.index(max(q_row)) == p_row.index(max(p_row))
            count += 1
    return same / count, kl / count


def test_it_is_what_a_loop_finds() -> None:
    model, parent = llama(0), llama(1)
    with torch.no_grad():  # near enough that some predictions are the same
        for ours, theirs in zip(model.parameters(), parent.parameters(), strict=True):
            theirs.copy_(0.7 * ours + 0.3 * theirs)
    results, found = evaluate_against(model, parent, TOKENS, sequence_length=16, batch_size=2)
    assert results == evaluate(model, TOKENS, sequence_length=16, batch_size=2)
    alone = evaluate(parent, TOKENS, sequence_length=16, batch_size=2)
    for name, tokens in TOKENS.items():
        same, kl = by_hand(model, parent, tokens, 16)
        assert 0 < found["a"].agreement < 1
        assert found[name].agreement == pytest.approx(same)
        assert found[name].kl == pytest.approx(kl, rel=1e-4)
        assert found[name].parent == alone[name]
        assert found[name].ratio == pytest.approx(results[name].perplexity / alone[name].perplexity)


def test_a_model_agrees_with_itself() -> None:
    model = llama(0)
    _, found = evaluate_against(model, model, TOKENS, sequence_length=8)
    assert {(each.agreement, each.kl, each.ratio) for each in found.values()} == {(1.0, 0.0, 1.0)}


def test_what_is_compared_may_be_bf16() -> None:
    logits = torch.randn(2, 3, 50)
    same, kl = compare_logits(logits.bfloat16(), logits.bfloat16())
    assert same.all() and kl.dtype == torch.float32 and same.shape == kl.shape == (2, 3)
    assert not kl.any()


@pytest.mark.parametrize("training", [True, False])
def test_both_are_left_as_they_were(training: bool) -> None:
    model, parent = llama(0).train(training), llama(1).train(not training)
    evaluate_against(model, parent, TOKENS, sequence_length=8)
    assert (model.training, parent.training) == (training, not training)


def test_the_shorter_context_counts() -> None:
    with pytest.raises(ConfigError, match="sequence_length is 17: it must be at most 16"):
        evaluate_against(llama(0), llama(1, positions=16), TOKENS, sequence_length=17)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one tokenizer, one with another vocabulary, one with another tokenizer, and text."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([Document("code", "a.py", TEXT)], 290)
    other = train_tokenizer([Document("code", "b.py", "else where " * 50)], 290)
    for name, model, kept in (
        ("child", llama(0), tokenizer),
        ("parent", llama(1, positions=32), tokenizer),
        ("wider", llama(1, 310), tokenizer),
        ("stranger", llama(1), other),
    ):
        model.save_pretrained(folder / name)
        kept.save_pretrained(folder / name)
    (folder / "a.txt").write_text(TEXT)
    return folder


def test_the_command_tells_it(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(folders / "child"), "--data", str(folders / "a.txt"), "--against", str(folders / "parent")]
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sequence_length"] == 32
    assert told["against"] == str(folders / "parent")
    agreement = told["agreement"]["a"]
    assert agreement["ratio"] == pytest.approx(
        told["domains"]["a"]["perplexity"] / agreement["parent"]["perplexity"], rel=1e-6
    )
    assert main.run(words) == 0
    shown = capsys.readouterr().out
    assert "same next token" in shown and f"{agreement['agreement']:.1%}" in shown


@pytest.mark.parametrize(
    ("parent", "message"),
    [("wider", "has a vocabulary of 300"), ("stranger", "the tokenizers in"), ("nowhere", "there is no model folder")],
)
def test_another_family_is_refused(
    parent: str, message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(folders / "child"), "--data", str(folders / "a.txt"), "--against", str(folders / parent)]
    assert main.run(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_without_a_parent_nothing_is_compared(folders: Path) -> None:
    report = evaluate_folder(folders / "child", sources=[str(folders / "a.txt")])
    assert (report.against, report.agreement) == (None, {})
