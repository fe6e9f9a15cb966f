"""``make setup``: made once, kept up to date, and never a CUDA build where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "scripts/make_venv.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip would have been asked for; on a Linux machine without a GPU."""
    calls: list[list[str]] = []
    monkeypatch.setattr(script, "install", lambda arguments, quiet=False: calls.append(arguments))
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    monkeypatch.setattr(script.sys, "platform", "linux")
    return calls


def test_without_a_gpu_only_a_cpu_build_is_asked_for(script: ModuleType, asked: list[list[str]]) -> None:
    script.install_torch("pinned")
    assert asked == [["--no-deps", f"{script.pin('torch')}+cpu"]]


@pytest.mark.parametrize(("platform", "gpu"), [("linux", True), ("darwin", False)])
def test_elsewhere_the_pinned_version(
    script: ModuleType, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, platform: str, gpu: bool
) -> None:
    monkeypatch.setattr(script, "has_gpu", lambda: gpu)
    monkeypatch.setattr(script.sys, "platform", platform)
    script.install_torch("pinned")
    assert asked == [["--no-deps", script.pin("torch")]]


def test_what_the_user_names_is_taken(script: ModuleType, asked: list[list[str]]) -> None:
    script.install_torch("torch==2.12.0")
    assert asked == [["--no-deps", "torch==2.12.0"]]


def test_no_cpu_build_is_explained(script: ModuleType, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str], quiet: bool = False) -> None:
        raise script.SetupError("ERROR: No matching distribution found for torch")

    monkeypatch.setattr(script, "install", fail)
    with pytest.raises(script.SetupError, match="TORCH=system"):
        script.install_torch("pinned")


@pytest.mark.parametrize(
    ("found", "bound", "older"),
    [("2.9.1", "2.11", True), ("2.11.0+cu130", "2.11", False), ("65.5.0", "77", True), ("3.0", "2.11", False)],
)
def test_versions_compare_as_numbers(script: ModuleType, found: str, bound: str, older: bool) -> None:
    assert script.is_older(found, bound) is older


def test_what_is_compiled_is_part_of_the_fingerprint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "NATIVE", tmp_path)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}")
    found = [script.inputs()]
    for name, text in (("a.cpp", "1"), ("a.cpp", "2"), ("a.hpp", "2"), ("a.h", "")):
        (tmp_path / name).write_text(text)
        found.append(script.inputs())
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    found.append(script.inputs())
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    found.append(script.inputs())
    assert len(set(found)) == len(found)
    (tmp_path / "a.py").touch()
    (tmp_path / "liba.so").touch()
    assert script.inputs() == found[-1]


class Checkout:
    """A copy of what ``make setup`` reads, set up with the torch of the running Python, without network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ["pyproject.toml", "constraints.txt", "LICENSE", "setup.py", "MANIFEST.in", SCRIPT]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "README.md").touch()
        (folder / "src" / "moesaic").mkdir(parents=True)
        (folder / "src" / "moesaic" / "__init__.py").touch()
        self.native = folder / "src" / "moesaic" / "experts" / "native"
        self.native.mkdir(parents=True)
        (self.native / "library.cpp").write_text('extern "C" int moesaic_abi() { return 1; }\n')

    def setup(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **variables}
        environment.pop("PIP_FIND_LINKS", None)
        command = [sys.executable, self.folder / SCRIPT, "parquet"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def stamp(self) -> dict[str, object]:
        return dict(json.loads((self.folder / ".venv" / "setup.json").read_text()))

    def python(self, code: str) -> str:
        done = subprocess.run([self.folder / ".venv/bin/python", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.mark.slow
def test_setup_from_nothing_to_moved(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "first")
    done = checkout.setup(TORCH="system")
    assert done.returncode == 0, done.stderr
    assert "making .venv" in done.stdout
    here = checkout.python("import moesaic, torch; print(moesaic.__file__)")
    assert Path(here).is_relative_to(checkout.folder)

    again = checkout.setup()  # the choice of torch is remembered
    assert (again.returncode, again.stdout) == (0, "")

    built = [path.name for path in checkout.native.iterdir() if path.suffix in (".so", ".dylib", ".txt")]
    assert len(built) == 1
    with (checkout.folder / "constraints.txt").open("a") as pins:
        pins.write("# another pin\n")
    before = checkout.stamp()
    updated = checkout.setup()
    assert updated.returncode == 0, updated.stderr
    assert "making .venv" not in updated.stdout
    assert checkout.stamp()["inputs"] != before["inputs"]

    (checkout.native / "library.cpp").write_text("this is no C++\n")
    broken = checkout.setup()
    assert broken.returncode == 0, broken.stderr
    assert [path.name for path in checkout.native.iterdir() if path.name != "library.cpp"] == ["not_built.txt"]

    checkout.folder = checkout.folder.rename(tmp_path / "second")
    moved = checkout.setup(TORCH="system")
    assert moved.returncode == 0, moved.stderr
    assert "making .venv" in moved.stdout
    assert Path(checkout.python("import moesaic; print(moesaic.__file__)")).is_relative_to(checkout.folder)


@pytest.mark.slow
def test_a_torch_too_old_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace('"torch>=2.11"', '"torch>=99.1"'))
    done = checkout.setup(TORCH="system")
    assert done.returncode == 2
    assert done.stderr.startswith("setup: error: torch")
    assert "at least 99.1" in done.stderr
    assert not (tmp_path / ".venv").exists()
