"""Tasks of lm-eval, on one that needs no network; skipped where the harness is not installed."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.cli import main
from moesaic.data import Document, load_tokenizer, train_tokenizer
from moesaic.errors import ConfigError, DataError, MissingDependencyError
from moesaic.train.harness import evaluate_tasks

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
QUESTIONS = [{"question": f"{i} and then", "choices": ["one", "two", "three four"], "answer": i % 3} for i in range(8)]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours, a dense one, and a task."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("code", "a.py", "one two three four and then " * 20)], 290)
    ours = MoesaicConfig(**SIZES, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    dense = LlamaConfig(**SIZES, intermediate_size=16)
    for name, model in {"ours": MoesaicForCausalLM(ours), "dense": LlamaForCausalLM(dense)}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "task.yaml").write_text(TASK.format(path=folder / "questions.jsonl"))
    return folder


def by_hand(path: Path) -> float:
    """The share of questions whose right answer has the highest log-probability after the question."""
    kind = MoesaicForCausalLM if path.name == "ours" else LlamaForCausalLM
    model, tokenizer = kind.from_pretrained(path).eval(), load_tokenizer(str(path))
    right = 0
    for question in QUESTIONS:
        start = tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['question']} {choice}")["input_ids"]
            with torch.no_grad():
                rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(rows[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.slow
def test_a_task_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    words = ["eval", str(folder / "ours"), "--task", str(folder / "task.yaml"), "--against", str(folder / "dense")]
    assert main.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"]["tiny_choice"]["examples"] == len(QUESTIONS)
    assert told["tasks"]["tiny_choice"]["metrics"]["acc"] == pytest.approx(by_hand(folder / "ours"))
    assert told["parent"]["tiny_choice"]["metrics"]["acc"] == pytest.approx(by_hand(folder / "dense"))
    assert main.run([*words, "--max-examples", "3"]) == 0
    assert "tiny_choice" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lm-eval knows no task 'arc_eassy': did you mean 'arc_easy'"):
        evaluate_tasks(folder / "ours", ["arc_eassy"])
    with pytest.raises(DataError, match=r"the task 'no\.yaml' does not exist"):
        evaluate_tasks(folder / "ours", ["no.yaml"])
    (tmp_path / "empty.yaml").write_text("output_type: multiple_choice\n")
    with pytest.raises(DataError, match="it has no line 'task: NAME'"):
        evaluate_tasks(folder / "ours", [str(tmp_path / "empty.yaml")])


def test_without_the_harness_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'moesaic\[lm-eval\]'"):
        evaluate_tasks(folder / "ours", ["arc_easy"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "x", "--split", "all"], "--task runs tasks in place of text"),
        (["--max-examples", "3"], "--few-shot and --max-examples belong to --task"),
        (["--few-shot", "0"], "--few-shot and --max-examples belong to --task"),
        (["--task", "x", "--max-examples", "-1"], "max_examples is -1: it must be at least 1"),
        (["--task", "x", "--batch-size", "0"], "batch_size is 0: it must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["eval", str(folder / "ours"), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
