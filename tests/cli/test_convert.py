"""``moesaic convert`` from the command line: every method, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.convert.models import dense_folder, dense_model, save

from moesaic.cli.main import run
from moesaic.cli.methods import METHODS, RUN, _told_distilled
from moesaic.hf.load import load_model

Captured = pytest.CaptureFixture[str]
TEXT = "the cat sat on a mat and some dog looked at it for a while\n" * 40
IDS = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dense models of one base, the base split in two ways' text, and a mixture."""
    folder = tmp_path_factory.mktemp("convert")
    base = dense_model()
    save(base, folder / "base")
    for name, size in (("one", 0.01), ("two", 0.02)):
        tuned = dense_model()
        with torch.no_grad():
            for parameter in tuned.model.layers.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        save(tuned, folder / name)
    dense_folder(folder / "stranger", seed=5)
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT.upper())
    assert run(["convert", str(folder / "base"), "--to", str(folder / "mixture"), "--method", "upcycle"]) == 0
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(folder)[0](IDS).logits
    return found


def convert(made: Path, out: Path, *words: str, model: str = "base") -> int:
    return run(["convert", str(made / model), "--to", str(out), *words])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "dense"], "nothing changed"),
        (["--method", "upcycle", "--experts", "3", "--top-k", "3", "--no-perturb"], "3 experts a layer"),
        (["--method", "split", "--experts", "4", "--active", "1"], "4 experts of 12 neurons"),
    ],
)
def test_what_must_be_the_same_model_is(
    made: Path, tmp_path: Path, words: list[str], says: str, capsys: Captured
) -> None:
    data = ["--data", str(made / "a.txt"), "--tokens", "512", "--sequence-length", "64"] if "split" in words else []
    assert convert(made, tmp_path / "out", *words, *data) == 0
    captured = capsys.readouterr()
    assert says in captured.out and f"wrote {tmp_path / 'out'}: " in captured.out
    torch.testing.assert_close(logits(tmp_path / "out"), logits(made / "base"), rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out.partial").exists()


def test_a_split_says_what_it_made(made: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ["--method", "split", "--experts", "6", "--active", "0.5", "--criterion", "domain", "--tokens", "600"]
    data = ["--data", f"low={made / 'a.txt'}", "-d", f"high={made / 'b.txt'}", "--sequence-length", "64"]
    assert convert(made, tmp_path / "out", *words, *data, "--json") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["method"] == "split" and told["folder"] == str(tmp_path / "out")
    assert told["made"]["plan"] == {"experts": 6, "d_ff": 8, "top_k": 3, "shared": 0}
    assert told["made"]["active"] == 0.5
    assert "calibration text" in captured.err
    assert load_model(tmp_path / "out")[0].config.num_experts == 6


BUDGET = ["--train-tokens", "256", "--sequence-length", "32", "--loss", "reverse_kl", "--mixture", "even"]


def test_a_split_that_learns_is_resumed(
    made: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / f"text/{number}.txt").write_text(f"{number} {TEXT}")
    words = ["--method", "split", "--experts", "6", "--tokens", "600", "--data", str(tmp_path / "text"), *BUDGET]

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.convert.taught.distill", stopped)
        assert convert(made, tmp_path / "out", *words) == 130
    assert (tmp_path / "out.split/config.json").is_file() and not (tmp_path / "out").exists()
    assert convert(made, tmp_path / "out", *words, "--experts", "4") == 2
    assert "out.split' holds another split (experts: 6 there, 4 now)" in capsys.readouterr().err
    assert convert(made, tmp_path / "out", *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)["made"]
    assert told["split"] is None and told["distilled"]["tokens"] >= 256
    assert sorted(told["distilled"]["shares"].values()) == [1.0]
    assert load_model(tmp_path / "out")[0].config.num_experts == 6
    assert not (tmp_path / "out.split").exists() and not (tmp_path / "out.partial").exists()
    words = ["--method", "distill", "--teacher", str(made / "base"), "--data", str(tmp_path / "text"), *BUDGET]
    assert run(["convert", str(tmp_path / "out"), "--to", str(tmp_path / "on"), *words]) == 0
    assert "learned from the dense model" in capsys.readouterr().out


def test_merges(made: Path, tmp_path: Path, capsys: Captured) -> None:
    others = ["--with", str(made / "one"), "--with", str(made / "two")]
    words = ["--method", "merge", *others, "--by", "ties", "--option", "density=0.5", "--weights", "0.5,1"]
    assert convert(made, tmp_path / "dense", *words, "--layer-weights", "0:ffn=1,0") == 0
    assert "2 models of this base merged by ties" in capsys.readouterr().out
    assert load_model(tmp_path / "dense")[0].config.model_type == "llama"
    assert convert(made, tmp_path / "moe", "--method", "merge", *others, "--into", "experts", "--no-base-expert") == 0
    assert "2 models of this base became 2 experts a layer" in capsys.readouterr().out
    assert load_model(tmp_path / "moe")[0].config.num_experts == 2


@pytest.mark.parametrize("how", ["drop", "merge"])
def test_prunes(made: Path, tmp_path: Path, how: str, capsys: Captured) -> None:
    words = ["--method", "prune", "--keep", "4", "--how", how, "--data", str(made / "a.txt"), "--tokens", "1024"]
    assert convert(made, tmp_path / "out", *words, model="mixture") == 0
    assert re.search(r"of 8 experts a layer 4 stay, which had [\d.]+% of the routed slots", capsys.readouterr().out)
    assert load_model(tmp_path / "out")[0].config.num_experts == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "splt"], "no such method 'splt': did you mean 'split'?"),
        (["--method", "merge", "--criterion", "weight"], "--criterion says nothing to --method merge"),
        (
            ["--method", "split", "--top-k", "2"],
            "--top-k says nothing to --method split: it is an option of upcycle, merge",
        ),
        (["--method", "merge", "--with", "{made}/one", "--top-k", "1"], "--top-k says nothing to merge into dense"),
        (["--method", "merge", "--with", "{made}/one", "--no-base-expert"], "--base-expert says nothing to merge into"),
        (["--method", "prune", "--keep", "2", "--trace", "r", "--tokens", "9"], "--tokens says nothing to --trace"),
        (["--method", "prune", "--keep", "2", "--similarity", "weights"], "--similarity says nothing to prune so: it"),
        (["--method", "split", "--no-perturb"], "--perturb says nothing to --method split"),
        (["--method", "split", "--loss", "kl"], "training needs a budget: give one of --minutes and --train-tokens"),
        (["--method", "split", "--minutes", "1", "--train-tokens", "9"], "give one of --minutes and --train-tokens"),
        (["--method", "split", "--train-tokens", "0"], "--train-tokens is 0: it must be a whole number from 1 on"),
        (["--method", "split", "--minutes", "0"], "minutes is 0.0: it must be above 0"),
        (["--method", "split", "--minutes", "1", "--loss", "kd"], "'kd'"),
        (["--method", "distill", "--minutes", "1"], "give it as --teacher"),
        (["--method", "distill", "--minutes", "1", "--teacher", "{made}/one"], "must be a mixture of ours"),
        (["--method", "merge"], "give at least one"),
        (["--method", "merge", "--with", "{made}/stranger"], "stranger"),
        (["--method", "merge", "--with", "{made}/one", "--weights", "a"], "--weights is 'a'"),
        (["--method", "merge", "--with", "{made}/one", "--option", "density"], "--option is 'density'"),
        (["--method", "merge", "--with", "{made}/one", "--layer-weights", "=1"], "--layer-weights is '=1'"),
        (["--method", "prune", "--keep", "2"], "mixture"),
        (["--method", "split", "--experts", "100", "--data", "{made}/a.txt"], "leaves an expert empty"),
        (["--method", "split", "--active", "0.53", "--data", "{made}/a.txt"], "active is 0.53"),
        (
            [
                "--method",
                "split",
                "--experts",
                "48",
                "--tokens",
                "60",
                "--sequence-length",
                "64",
                "--data",
                "{made}/a.txt",
            ],
            "too short for 48 experts",
        ),
        (["--method", "split", "--sequence-length", "64", "--data", "{made}/nothing"], "does not exist"),
        (["--method", "dense", "--shard-gib", "0"], "--shard-gib is 0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    made: Path, tmp_path: Path, words: list[str], message: str, capsys: Captured
) -> None:
    words = [word.replace("{made}", str(made)) for word in words]
    assert convert(made, tmp_path / "out", *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.err.count("error") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["split", "upcycle", "merge"])
def test_a_mixture_where_a_dense_model_is_needed(made: Path, tmp_path: Path, method: str, capsys: Captured) -> None:
    more = ["--with", str(made / "one")] if method == "merge" else []
    assert convert(made, tmp_path / "out", "--method", method, *more, model="mixture") == 2
    assert "is a mixture of experts already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(made: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").mkdir()
    assert convert(made, tmp_path / "out", "--method", "dense") == 2
    assert "exists" in capsys.readouterr().err


def test_every_option_of_a_method_is_an_option(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["convert", "--help"]) == 0
    shown = capsys.readouterr().out
    names = {name for options in METHODS.values() for name in options}
    assert [name for name in names if f"--{name.replace('_', '-')} " not in shown] == []


def test_what_is_printed_to_compare_works(made: Path, tmp_path: Path, capsys: Captured) -> None:
    assert convert(made, tmp_path / "my mixture", "--method", "upcycle", "--experts", "2") == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["moesaic", "eval"]
    assert run([*command[1:], "--data", str(made / "a.txt")]) == 0
    assert "same next token" in capsys.readouterr().out


def test_an_interrupted_method_says_what_it_leaves(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(RUN, "upcycle", stopped)
    assert convert(made, tmp_path / "out", "--method", "upcycle") == 130
    assert capsys.readouterr().err == ""
    (tmp_path / "out.partial").mkdir()
    assert convert(made, tmp_path / "out", "--method", "upcycle") == 130
    assert f"interrupted: the same command goes on from '{tmp_path}/out.partial'" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "says"), [(float("nan"), "(a 100% at the end)"), (2.0, "loss 2.000 at first")])
def test_a_start_that_took_no_step_tells_no_loss(first: float, says: str) -> None:
    made = SimpleNamespace(shares={"a": 1.0}, seconds=60.0, steps=4, tokens=512, first=first, last=first)
    told = _told_distilled(made)  # type: ignore[arg-type]
    assert says in told and "nan" not in told


def test_a_budget_that_the_warm_start_takes_is_told() -> None:
    made = SimpleNamespace(shares={"a": 1.0}, seconds=60.0, steps=0, tokens=0, first=float("nan"), last=float("nan"))
    told = _told_distilled(made)  # type: ignore[arg-type]
    assert told == "fitted to the dense model's layers for 1.0 min, and not trained: the minutes were over"
