"""``moesaic finetune`` from outside, and the commands that take what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.adapters import bases
from tests.train import tiny

from moesaic.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.save("ours", tmp_path_factory.mktemp("bases") / "ours", corpus)


@pytest.fixture
def words(corpus: list[str]) -> list[str]:
    """Options and keys of a short run."""
    return [*bases.SETTINGS, *(word for source in corpus for word in ("-d", source))]


@pytest.fixture
def moesaic(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: its exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main.run([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_run_is_an_adapter_for_the_other_commands(
    moesaic: Run, base: Path, words: list[str], corpus: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, printed, err = moesaic("finetune", base, *words, "--out", out)
    assert code == 0, err
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["domain", "sums", "words"]
    assert "8 steps, 512 tokens, " in printed
    assert f"MB in {out / 'adapter'}" in printed
    assert "scoring the experts on 256 tokens" in err
    assert "trained; training tokens" in err
    data = ["--data", corpus[0], "--json"]
    plain = json.loads(moesaic("eval", base, *data)[1])
    for path in (out, out / "adapter"):
        adapted = json.loads(moesaic("eval", base, "--adapter", path, *data)[1])
        assert adapted["domains"]["words"]["loss"] < plain["domains"]["words"]["loss"]
    table = moesaic("eval", base, "--adapter", out, "--data", corpus[0])[1]
    assert f"{base}with{out}:alltext" in "".join(table.split())  # a narrow terminal breaks lines anywhere
    prompt = ["--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0", "--json"]
    told = [json.loads(moesaic("generate", base, *prompt, *more)[1])["text"] for more in ([], ["--adapter", out])]
    assert told[0] != told[1]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_low_rank_adapter_is_measured_as_it_was_trained(
    moesaic: Run, base: Path, words: list[str], corpus: list[str], tmp_path: Path, quantized: bool
) -> None:
    if quantized:
        assert moesaic("quantize", base, "--to", "int8", "--out", tmp_path / "base")[0] == 0
        base = tmp_path / "base"
    # Of a base that is no run, eval holds out what training does by default.
    others = ("adapter.threshold", "adapter.sample_tokens", "data.validation_fraction")
    settings = [word for word in words if not word.startswith(others)]
    lora = ["method=lora", "targets=both", "precision=bf16"]
    code, printed, err = moesaic("finetune", base, *settings, *lora, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    data = [word for source in corpus for word in ("-d", source)]
    same = ["--split", "validation", "--sequence-length", 16, "--max-tokens", 128, "--precision", "bf16", "--json"]
    code, measured, err = moesaic("eval", base, "--adapter", tmp_path / "run", *data, *same, "--batch-size", 4)
    assert code == 0, err
    after = json.loads(printed)["after"]
    for domain, result in json.loads(measured)["domains"].items():
        assert result["loss"] == pytest.approx(after[domain]["loss"], rel=1e-7)
    short = ["--prompt", "the cat", "--max-new-tokens", 3]
    assert moesaic("generate", base, "--adapter", tmp_path / "run", *short)[0] == 0


def test_json_is_one_document(moesaic: Run, base: Path, words: list[str], tmp_path: Path) -> None:
    code, printed, err = moesaic("finetune", base, *words, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    told = json.loads(printed)
    assert (told["method"], told["adapter"]) == ("esft", str(tmp_path / "run/adapter"))
    assert 0 < told["trained_parameters"] < told["parameters"]
    assert told["after"]["words"]["loss"] < told["before"]["words"]["loss"]


def test_a_recipe_file_and_the_folder_of_a_training_run_will_do(
    moesaic: Run, base: Path, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "mine/model")
    (tmp_path / "poet.toml").write_text(
        '[adapter]\nmethod = "esft"\nthreshold = 0.4\nsample_tokens = 64\n'
        f"[data]\nsources = {json.dumps(corpus)}\nsequence_length = 16\nvalidation_fraction = 0.2\n"
        "[train]\nsteps = 2\nbatch_size = 4\neval_tokens = 64\n"
    )
    code, _, err = moesaic("finetune", "mine", "poet.toml", "threshold=0.6")
    assert code == 0, err
    note = json.loads((tmp_path / "runs/poet/run.json").read_text())
    assert note["recipe"]["adapter"]["threshold"] == 0.6
    assert note["recipe"]["base"] == str(tmp_path / "mine")
    assert note["base"]["name"] == "mine"


# Words after the model; what must stand in the one line of the error.
BAD = [
    (["adapter.method=estf"], "unknown fine-tuning method 'estf': did you mean 'esft'? allowed: esft, full, lora"),
    (["adapter.treshold=0.1"], "unknown recipe key 'adapter.treshold' in the command line: did you mean"),
    (["adapter.threshold=0"], "adapter.threshold is 0 in the command line: it must be a number, above 0, at most 1"),
    (["adapter.score=gates"], "adapter.score is 'gates' in the command line: it must be one of gate, token"),
    (["method=full", "threshold=0.1"], "unknown recipe key 'threshold'"),
    (["model.d_model=3"], "unknown recipe key 'model.d_model' in the command line"),
    (["data.vocab_size=300"], "unknown recipe key 'data.vocab_size'"),
    (["data.sequence_length=65"], "data.sequence_length is 65: it must be at most 64"),
    (["another"], "give one model, not 2"),
    (["base=another"], "the model is named twice: give either MODEL or base=..."),
    (["one.toml", "two.toml"], "give at most one recipe file, not 2"),
    (["-d", "no-such-file.txt", "--overwrite"], "data path 'no-such-file.txt' does not exist"),
    (["--resume"], "there is no run to resume in"),
]


@pytest.mark.parametrize(("more", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    moesaic: Run, base: Path, words: list[str], tmp_path: Path, more: list[str], expected: str
) -> None:
    out = tmp_path / "run"
    given = [word for word in words if not word.startswith("adapter.")]
    code, printed, err = moesaic("finetune", base, *given, "--out", out, *more)
    assert (code, printed) == (2, "")
    (line,) = [line for line in err.splitlines() if line != "reading the data"]
    assert line.startswith("moesaic: error: ")
    assert expected in line
    assert not out.exists()


def test_no_model_a_model_that_is_none_and_a_wrong_adapter_are_told(
    moesaic: Run, base: Path, words: list[str], corpus: list[str], tmp_path: Path
) -> None:
    assert "there is no model to fine-tune: give MODEL" in moesaic("finetune", *words)[2]
    code, _, err = moesaic("finetune", tmp_path / "none", *words)
    assert code == 2
    assert "there is no model folder at" in err
    out = tmp_path / "run"
    assert moesaic("finetune", base, *words, "train.steps=2", "--out", out)[0] == 0
    code, _, err = moesaic("eval", out)
    assert code == 2
    assert "holds an adapter, not a model: give the model that it adapts, and this as --adapter" in err
    other = bases.save("ours", tmp_path / "other", corpus)
    bases.make("ours", seed=1).save_pretrained(other)
    for command in (["eval", other, "-d", corpus[0]], ["generate", other, "--prompt", "the"]):
        code, _, err = moesaic(*command, "--adapter", out)
        assert code == 2
        assert "was trained from another base model" in err
    os.truncate(out / "adapter/experts.safetensors", 200)
    code, _, err = moesaic("eval", base, "-d", corpus[0], "--adapter", out)
    assert code == 2
    assert "experts.safetensors is damaged or truncated" in err


def test_a_run_goes_on_by_its_own_command_only(moesaic: Run, base: Path, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert moesaic("finetune", base, *words, "train.steps=2", "--out", out)[0] == 0
    code, _, err = moesaic("train", "--resume", "--out", out)
    assert code == 2
    assert "is one of 'moesaic finetune': go on with it by that command" in err
    code, _, err = moesaic("finetune", base, *words, "train.steps=3", "--out", out, "--resume")
    assert code == 2
    assert "cannot go on with another recipe: train.steps (2 then, 3 now)" in err
    code, _, err = moesaic("finetune", base, *words, "--out", out)
    assert code == 2
    assert "holds a run already (finished)" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_command_and_its_resumption(
    moesaic: Run, base: Path, words: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    given = ["finetune", base, *words, "train.steps=400", "train.save_every=20", "train.threads=1", "--out"]
    command = [sys.executable, "-m", "moesaic", *map(str, given), str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not list((out / "checkpoints").glob("step-*[0-9]")):
            assert process.poll() is None
        process.send_signal(number)
        rest = process.stderr.read()
        code = process.wait()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        (line,) = [line for line in rest.splitlines() if "stopped by" in line]
        assert line.endswith(f"go on with: moesaic finetune --resume --out {out}")
    resume = [sys.executable, "-m", "moesaic", "finetune", "--resume", "--out", str(out)]
    subprocess.run(resume, check=True, capture_output=True)
    assert moesaic(*given, tmp_path / "straight")[0] == 0
    assert tiny.losses(out) == tiny.losses(tmp_path / "straight")
    same = [(folder / "adapter/experts.safetensors").read_bytes() for folder in (out, tmp_path / "straight")]
    assert same[0] == same[1]
