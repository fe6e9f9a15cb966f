"""``moesaic generate --rewire``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.cli.main import run

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_streams_what_its_json_says(kind: str, models: Path, capsys: Captured) -> None:
    words = ["generate", str(models / kind), "--prompt", "def add", "--max-new-tokens", "9", "--seed", "3", "--rewire"]
    words += ["--rewire-steps", "2", "--rewire-interval", "4", "--rewire-layers", "1", "--rewire-learning-rate", "0.5"]
    assert run(words) == 0
    streamed = capsys.readouterr().out
    assert run([*words, "--json", "--rewire-max-tokens", "100"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert streamed.rstrip("\n") == ("def add" + told["text"]).rstrip("\n")
    assert [len(each["losses"]) for each in told["rewired"]] == [2] * -(-told["new_tokens"] // 4)
    assert [len(each["layers"]) for each in told["rewired"]] == [2] * len(told["rewired"])


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("ours", ["--rewire-steps", "3"], "--rewire-steps needs --rewire"),
        (
            "ours",
            ["--rewire", "--rewire-layers", "0"],
            "layers of the rewiring is 0.0: it must be above 0 and at most 1",
        ),
        ("dense", ["--rewire"], "LlamaForCausalLM has no MoE layer with a gate: there is nothing to rewire"),
    ],
)
def test_one_clear_line(kind: str, words: list[str], message: str, models: Path, capsys: Captured) -> None:
    for form in (["--json"], []):
        assert run(["generate", str(models / kind), "--prompt", "x", *form, *words]) == 2
        out, error = capsys.readouterr()
        assert (out, message in error.replace("\n", " ")) == ("", True)
