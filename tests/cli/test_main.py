from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from moesaic.cli import main
from moesaic.cli.output import print_json, print_table
from moesaic.errors import ConfigError, Interrupted, MoesaicError

MODULES = Path(main.__file__).parent


def moesaic(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moesaic", *arguments], capture_output=True, text=True, **options)


Failing = Callable[[BaseException], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Make ``moesaic doctor`` raise what the test says."""

    def fail_with(error: BaseException) -> None:
        def command() -> None:
            raise error

        monkeypatch.setattr(main.importlib, "import_module", lambda name: SimpleNamespace(command=command))

    return fail_with


def test_every_command_has_its_file_and_every_file_its_command() -> None:
    files = {path.stem for path in MODULES.glob("*.py")} - {"__init__", "main", "methods", "output", "progress"}
    assert files == set(main.COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], [], ["-h"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in main.COMMANDS)


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "--help"]) == 0
    assert f"moesaic {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from moesaic.cli.main import COMMANDS, run\n"
        "for arguments in [['--help'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    assert run(arguments) == 0, arguments\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_the_root_imports_no_command() -> None:
    code = (
        "import sys; from moesaic.cli.main import COMMANDS, run\n"
        "assert run(['--help']) == 0\n"
        "assert not {f'moesaic.cli.{name}' for name in COMMANDS} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"moesaic": "1.2.3"}.__getitem__)
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == "moesaic 1.2.3\n"


def test_version_of_a_source_tree(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert main.run(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "no such command 'trian': did you mean 'train'?"),
        (["--vresion"], "No such option: --vresion"),
        (["doctor", "--jsno"], "No such option: --jsno"),
        (["doctor", "now"], "now"),
        (["export"], "Missing argument"),
    ],
)
def test_wrong_usage_is_one_line_and_two(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moesaic: error: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MoesaicError("it broke"), 1, "it broke"),
        (ConfigError("top_k is 9:\n  at most 8"), 2, "top_k is 9: at most 8"),
        (Interrupted("stopped after step 7"), 130, "stopped after step 7"),
        (OSError(errno.ENOSPC, "disk full", "runs/a"), 2, "runs/a: No space left on device"),
        (OSError(errno.EDQUOT, "quota"), 2, "Disk quota exceeded"),
        (FileNotFoundError(errno.ENOENT, "gone", "x.toml"), 1, "x.toml: No such file or directory"),
        (PermissionError(errno.EACCES, "no"), 1, "Permission denied"),
    ],
)
def test_known_errors_are_one_line(
    failing: Failing, error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert main.run(["doctor"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"moesaic: error: {told}\n")


def test_an_interrupt_is_130(failing: Failing) -> None:
    failing(KeyboardInterrupt())
    assert main.run(["doctor"]) == 130


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(errno.EIO, "a broken disk")])
def test_a_defect_keeps_its_traceback(failing: Failing, error: Exception) -> None:
    failing(error)
    with pytest.raises(type(error)):
        main.run(["doctor"])


def test_traceback_on_request(failing: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_TRACEBACK", "1")
    failing(MoesaicError("it broke"))
    with pytest.raises(MoesaicError):
        main.run(["doctor"])


def test_exit_code_reaches_the_shell() -> None:
    assert moesaic("--help").returncode == 0
    done = moesaic("no-such-command")
    assert done.returncode == 2
    assert done.stderr.startswith("moesaic: error: no such command")


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "moesaic", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_json_is_one_strict_document(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    document = {"a": float("nan"), "b": Path("x"), "c": (1, 2.5), "d": torch.arange(2), "e": {"z", "y"}, 3: "ü"}
    print_json(document)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": None, "b": "x", "c": [1, 2.5], "d": [0, 1], "e": ["y", "z"], "3": "ü"}
    assert "ü" in printed
    with pytest.raises(TypeError, match="object"):
        print_json({"a": object()})


def test_tables_print_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("By [domain]", ["domain", "tokens"], [["[code]", "1,000"], ["prose", "20"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["By [domain]", " domain  tokens", " [code]   1,000", " prose       20"]
