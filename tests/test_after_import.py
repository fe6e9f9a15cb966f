"""Registering with a module that is imported later, and what ``import moesaic`` itself brings in."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moesaic.after_import import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "imported_later"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("value = 7\n")
    (tmp_path / name / "part.py").write_text("value = 8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    for module in (name, f"{name}.part"):
        sys.modules.pop(module, None)


def test_before_the_import(package: str) -> None:
    seen: list[int] = []
    finders = list(sys.meta_path)
    after_import(package, lambda: seen.append(sys.modules[package].value))
    assert seen == []
    importlib.import_module(package)
    assert seen == [7]
    assert sys.meta_path == finders
    importlib.import_module(f"{package}.part")
    assert seen == [7]


def test_after_the_import(package: str) -> None:
    importlib.import_module(package)
    finders, seen = list(sys.meta_path), []
    after_import(package, lambda: seen.append(1))
    assert seen == [1]
    assert sys.meta_path == finders


def test_a_submodule_first(package: str) -> None:
    seen: list[int] = []
    after_import(package, lambda: seen.append(1))
    importlib.import_module(f"{package}.part")
    assert seen == [1]


def test_two_actions(package: str) -> None:
    seen: list[str] = []
    after_import(package, lambda: seen.append("first"))
    after_import(package, lambda: seen.append("second"))
    importlib.import_module(package)
    assert sorted(seen) == ["first", "second"]


def test_the_module_looks_as_if_nobody_had_watched(package: str) -> None:
    after_import(package, lambda: None)
    module = importlib.import_module(package)
    assert module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__module__.startswith(("importlib", "_frozen_importlib"))
    assert importlib.reload(module).value == 7


def test_other_modules_are_left_alone(package: str) -> None:
    after_import(package, lambda: pytest.fail("nobody imported it"))
    importlib.import_module("colorsys")
    assert importlib.util.find_spec("no_such_module_at_all") is None


def test_a_module_that_is_not_installed() -> None:
    after_import("no_such_module_at_all", lambda: pytest.fail("nobody could import it"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        importlib.import_module("no_such_module_at_all")


def test_a_module_that_fails_may_be_tried_again(package: str, tmp_path: Path) -> None:
    seen: list[int] = []
    source = tmp_path / package / "__init__.py"
    source.write_text("raise RuntimeError('not yet')\n")
    after_import(package, lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(package)
    assert seen == []
    source.write_text("value = 9  # longer than before, so that no cached code is taken\n")
    importlib.import_module(package)
    assert seen == [1]


def test_only_looking_for_a_module_does_not_use_up_the_action(package: str) -> None:
    seen: list[int] = []
    after_import(package, lambda: seen.append(1))
    spec = importlib.util.find_spec(package)
    assert spec.loader.get_filename(package).endswith("__init__.py")
    assert seen == []
    importlib.import_module(package)
    assert seen == [1]


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REGISTERED = """
    from transformers import AutoConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    assert "moesaic" in ALL_EXPERTS_FUNCTIONS
    assert type(AutoConfig.for_model("moesaic")).__name__ == "MoesaicConfig"
"""


def test_importing_moesaic_is_light() -> None:
    heavy = run("""
        import sys
        import moesaic
        dir(moesaic)
        print([name for name in ("torch", "transformers", "numpy", "pydantic") if name in sys.modules])
    """)
    assert heavy == "[]"


def test_moesaic_first() -> None:
    run("import moesaic\nimport transformers\n" + textwrap.dedent(REGISTERED))


def test_transformers_first() -> None:
    run("import transformers\nimport moesaic\n" + textwrap.dedent(REGISTERED))


def test_only_a_name_of_moesaic() -> None:
    run("from moesaic import MoesaicForCausalLM\n" + textwrap.dedent(REGISTERED))


def test_every_public_name_is_there() -> None:
    import moesaic

    assert len(moesaic.__all__) == len(set(moesaic.__all__)) > 10
    assert {*moesaic.__all__, "__version__"} == set(dir(moesaic))
    for name in moesaic.__all__:
        assert getattr(moesaic, name) is not None


def test_a_name_that_is_not_public() -> None:
    import moesaic

    with pytest.raises(AttributeError, match="module 'moesaic' has no attribute 'nonsense'"):
        _ = moesaic.nonsense
