"""The house stands: each floor imports only the floors below it, files and functions stay small, all is documented."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "moesaic"

# From the ground up; modules on one floor may import each other.
FLOORS = [
    {"eager", "errors", "registry", "hardware", "folders", "after_import"},
    {"routing"},
    {"dispatch"},
    {"experts"},
    {"autotune"},
    {"parallel"},
    {"layer", "few_tokens", "config"},
    {"hf"},
    {"data"},
    {"inspect"},
    {"train"},
    {"adapters"},
    {"serve"},
    {"convert"},
    {"bench"},
    {"cli", "__main__"},
]
# Packages whose modules are called otherwise.
MODULES = {"llama_cpp_python": "llama_cpp"}
# Peers that no extra of ours could bring: one pins other versions, the other one is built from its source in place.
ELSEWHERE = {"vllm", "tutel"}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def level(name: str) -> int | None:
    """The floor of a module directly under the package, or None."""
    return next((index for index, floor in enumerate(FLOORS) if name in floor), None)


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that ``path`` imports, wherever in the file it stands."""
    here = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: -node.level], *filter(None, [node.module])]) if node.level else node.module
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def floor_violations(package: Path) -> list[str]:
    """Imports that reach up the house, or past the front door (``import moesaic``), or modules without a floor."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        own = where.parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the front door shows every floor
        if level(own) is None:
            found.append(f"{where}: {own!r} stands on no floor")
            continue
        for line, name in imports(path, package):
            parts = name.split(".")
            if parts[0] != package.name:
                continue
            imported = level(parts[1]) if len(parts) > 1 else None
            if imported is None:
                found.append(f"{where}:{line}: imports {name}, which is on no floor; name its own module")
            elif imported > level(own):
                found.append(f"{where}:{line}: {own} may not import {parts[1]}, which stands above it")
    return found


def size_violations(package: Path) -> list[str]:
    """Files and functions that are too long; a docstring does not count towards a function's length."""
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        where = path.relative_to(package)
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            found.append(f"{where}: {lines} lines, at most {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                length = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if length > LONGEST_FUNCTION:
                    found.append(f"{where}:{node.lineno}: {node.name} has {length} lines, at most {LONGEST_FUNCTION}")
    return found


def undocumented(package: Path) -> list[str]:
    """Modules, and public classes and functions at their top level, without a docstring."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            found.append(f"{where}: the module has no docstring")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not node.name.startswith("_") and not ast.get_docstring(node):
                    found.append(f"{where}:{node.lineno}: {node.name} has no docstring")
    return found


def undeclared(package: Path, project: Path) -> list[str]:
    """Imported packages that ``pyproject.toml`` does not name."""
    told = tomllib.loads(project.read_text())["project"]
    lines = [*told["dependencies"], *(line for extra in told["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in lines}
    known = {MODULES.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {package.name} | ELSEWHERE
    found = []
    for path in sorted(package.rglob("*.py")):
        for line, name in imports(path, package):
            if (top := name.split(".")[0]) not in known:
                found.append(f"{path.relative_to(package)}:{line}: imports {top}, which pyproject.toml does not name")
    return found


def test_floors_hold() -> None:
    assert floor_violations(SOURCE) == []


def test_files_and_functions_are_small() -> None:
    assert size_violations(SOURCE) == []


def test_everything_public_is_documented() -> None:
    assert undocumented(SOURCE) == []


def test_every_dependency_is_declared() -> None:
    assert undeclared(SOURCE, ROOT / "pyproject.toml") == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package with two sound modules, for the violations below."""
    package = tmp_path / "moesaic"
    (package / "routing").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Front door."""\nfrom moesaic.layer import MoE\n')
    (package / "layer.py").write_text('"""Layer."""\nfrom moesaic.routing import Routing\n')
    (package / "routing" / "__init__.py").write_text('"""Routing."""\nfrom moesaic import errors\n')
    return package


def test_a_sound_house_passes(house: Path) -> None:
    assert [*floor_violations(house), *size_violations(house), *undocumented(house)] == []


@pytest.mark.parametrize(
    "line",
    [
        "from moesaic.layer import MoE",
        "import moesaic.layer",
        "from moesaic import layer",
        "from .. import layer",
        "from ..layer import MoE",
        "def f():\n    from moesaic.experts.loop import run",
        "import importlib\nimportlib.import_module('moesaic.train.loop')",
        "import moesaic",
        "from moesaic import MoE",
    ],
)
def test_reaching_up_is_found(house: Path, line: str) -> None:
    (house / "routing" / "top.py").write_text(f'"""Router."""\n{line}\n')
    assert len(floor_violations(house)) == 1


def test_a_module_without_a_floor_is_found(house: Path) -> None:
    (house / "utils.py").write_text('"""Things."""\n')
    assert floor_violations(house) == ["utils.py: 'utils' stands on no floor"]


def test_long_files_and_functions_are_found(house: Path) -> None:
    function = 'def f():\n    """Words\n\n    and words."""\n' + "    x = 1\n" * LONGEST_FUNCTION
    (house / "layer.py").write_text(f'"""Layer."""\n{function}')
    assert size_violations(house) == []
    (house / "layer.py").write_text(f'"""Layer."""\n{function}    x = 2\n' + "\n" * LONGEST_FILE)
    assert [violation.split(": ")[1].split(",")[0] for violation in size_violations(house)] == [
        f"{LONGEST_FILE + LONGEST_FUNCTION + 6} lines",
        f"f has {LONGEST_FUNCTION + 1} lines",
    ]


def test_missing_docstrings_are_found(house: Path) -> None:
    (house / "layer.py").write_text("class MoE: ...\ndef run(): ...\ndef _private(): ...\n")
    assert [violation.split(": ")[1] for violation in undocumented(house)] == [
        "the module has no docstring",
        "MoE has no docstring",
        "run has no docstring",
    ]


def test_an_undeclared_dependency_is_found(house: Path) -> None:
    (house / "layer.py").write_text('"""Layer."""\nimport torch, re, einops\n')
    assert [violation.split(": ")[1] for violation in undeclared(house, ROOT / "pyproject.toml")] == [
        "imports einops, which pyproject.toml does not name"
    ]
