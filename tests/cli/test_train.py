"""``moesaic train`` from outside: words, output, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train import tiny

from moesaic.cli import main
from moesaic.train.folder import RunFolder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def recipe(corpus: list[str], tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    sections: dict[str, list[str]] = {"data": [f"sources = {json.dumps(corpus)}"]}
    for word in tiny.SETTINGS:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {json.dumps(value) if value[0].isalpha() else value}")
    path = tmp_path / "tiny.toml"
    path.write_text("".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items()))
    return path


@pytest.fixture
def moesaic(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: its exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main.run([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_it_trains_and_prints_perplexity_before_and_after(moesaic: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = moesaic("train", recipe, "train.steps=4", "--out", tmp_path / "run")
    assert code == 0, err
    assert "Validation perplexity" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["domain", "sums", "words"]
    assert "4 steps, 256 tokens, " in out
    assert f"; model in {tmp_path / 'run/model'}" in out
    assert "validation perplexity at step 0: sums " in err
    assert "step 4/4 · loss " in err
    assert "load max/mean" in err


def test_json_is_one_document(moesaic: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = moesaic("train", recipe, "train.steps=4", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["steps"], told["tokens"], told["model"]) == (4, 256, str(tmp_path / "run/model"))
    assert told["after"]["words"]["perplexity"] < told["before"]["words"]["perplexity"]


def test_without_out_the_run_is_named_after_the_recipe(
    moesaic: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert moesaic("train", recipe, "train.steps=4")[0] == 0
    assert (tmp_path / "runs/tiny/run.json").is_file()


def test_data_is_short_for_the_sources(moesaic: Run, recipe: Path, corpus: list[str], tmp_path: Path) -> None:
    code, out, err = moesaic("train", recipe, "train.steps=3", "--data", corpus[0], "--out", tmp_path / "run", "--json")
    assert code == 0, err
    assert set(json.loads(out)["after"]) == {"words"}
    assert json.loads((tmp_path / "run/run.json").read_text())["recipe"]["data"]["sources"] == [corpus[0]]


# Words after the recipe; what must stand in the one line of the error.
BAD = [
    (["train.stpes=3"], "unknown recipe key 'train.stpes' in the command line: did you mean 'train.steps'?"),
    (["train.steps=0"], "train.steps is 0 in the command line: it must be an integer, at least 1"),
    (["model.top_k=5"], "model.top_k is 5: it must be at most model.num_experts = 4"),
    (["model.d_model=33"], "model.d_model is 33: model.num_heads = 2 must divide it"),
    (["model.router=softmax"], "unknown router 'softmax': did you mean 'softmax_topk'?"),
    (["data.sources=no-such-file.txt"], "data path 'no-such-file.txt' does not exist"),
    (["data.sources=empty=EMPTY"], "the corpus is empty"),
    (["data.tokenizer=no-such-tokenizer"], "no tokenizer 'no-such-tokenizer'"),
    (["--data", "EMPTY", "data.sources=EMPTY"], "the data is named twice: give either --data or data.sources=..."),
    (["-d", "EMPTY", "sources=EMPTY"], "the data is named twice: give either --data or data.sources=..."),
    (["-d", "no-such-file.txt"], "data path 'no-such-file.txt' does not exist"),
    (["train.threads=100000"], "train.threads is 100000: it must be at most "),
    (["model.d_ff=1000000000000"], "there is not enough memory for the model: its "),
    (["other.toml"], "give at most one recipe file, not 2"),
    (["--resume"], "there is no run to resume in"),
    (["--out", "EMPTY"], "cannot be written to: choose another one with --out"),
    (["--bogus"], "--bogus"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    moesaic: Run, recipe: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    words = [word.replace("EMPTY", str(empty)) for word in words]
    out = tmp_path / "run"
    code, printed, err = moesaic("train", recipe, "--out", out, *words)
    assert (code, printed) == (2, "")
    (line,) = [line for line in err.splitlines() if line != "reading the data"]
    assert line.startswith("moesaic: error: ")
    assert expected in line
    assert not out.exists()


def test_a_missing_recipe_is_told(moesaic: Run, tmp_path: Path) -> None:
    code, _, err = moesaic("train", tmp_path / "none.toml")
    assert code == 2
    assert "there is no recipe" in err


def test_a_folder_in_use_is_told(moesaic: Run, recipe: Path, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "run")
    other.open(resume=False, overwrite=False)
    code, _, err = moesaic("train", recipe, "--out", tmp_path / "run")
    other.close()
    assert code == 2
    assert "is in use by another run" in err


def test_a_run_that_is_there_needs_overwrite(moesaic: Run, recipe: Path, tmp_path: Path) -> None:
    words = ["train", recipe, "train.steps=4", "--out", tmp_path / "run"]
    assert moesaic(*words)[0] == 0
    code, _, err = moesaic(*words)
    assert code == 2
    assert "holds a run already (finished): go on with it by --resume, replace it by --overwrite" in err
    assert moesaic(*words, "--overwrite")[0] == 0


def test_a_checkpoint_of_another_configuration_or_a_truncated_one_is_told(
    moesaic: Run, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert moesaic("train", recipe, "train.steps=4", "--out", out)[0] == 0
    code, _, err = moesaic("train", recipe, "train.steps=4", "model.d_ff=32", "--out", out, "--resume")
    assert code == 2
    assert "cannot go on with another recipe: model.d_ff (24 then, 32 now)" in err
    for path in (out / "checkpoints").glob("*/__0_0.distcp"):
        os.truncate(path, 99)
    code, _, err = moesaic("train", "--out", out, "--resume")
    assert code == 2
    assert "no checkpoint in" in err
    assert "__0_0.distcp has 99 bytes of" in err


def test_a_loss_that_is_not_finite_is_told(moesaic: Run, recipe: Path, tmp_path: Path) -> None:
    words = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.save_every=1"]
    code, _, err = moesaic("train", recipe, *words, "--out", tmp_path / "run")
    assert code == 1
    assert "moesaic: error: step 2 is not finite" in err
    assert "the last good checkpoint is" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_and_its_resumption(
    moesaic: Run, recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    words = ["train", recipe, "train.steps=400", "train.save_every=20", "train.threads=1", "--out"]
    command = [sys.executable, "-m", "moesaic", *map(str, words), str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not list((out / "checkpoints").glob("step-*[0-9]")):
            assert process.poll() is None
        process.send_signal(number)
        rest = process.stderr.read()
        code = process.wait()
    last = max(tiny.losses(out))
    assert 20 <= last < 400
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        (line,) = [line for line in rest.splitlines() if "stopped by" in line]
        assert f"stopped by {number.name} after step {last} of 400, which is saved; " in line
        assert line.endswith(f"go on with: moesaic train --resume --out {out}")
    resume = [sys.executable, "-m", "moesaic", "train", "--resume", "--out", str(out)]
    subprocess.run(resume, check=True, capture_output=True)
    assert moesaic(*words, tmp_path / "straight")[0] == 0
    assert tiny.losses(out) == tiny.losses(tmp_path / "straight")
    assert max(tiny.losses(out)) == 400
