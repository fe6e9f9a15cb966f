"""The site says what is true: every command has its section, and what it shows of a command exists."""

from __future__ import annotations

import pkgutil
import re
import runpy
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import moesaic
from moesaic.cli.main import COMMANDS, run

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text()


def section(name: str) -> str:
    found = re.search(rf"^## moesaic {name}\n(.*?)(?=^## |\Z)", CLI_PAGE, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_its_section(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = section(name)
    assert f"moesaic {name}" in text
    monkeypatch.setenv("COLUMNS", "200")  # so that the help wraps no name
    assert run([name, "--help"]) == 0
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= options


def test_no_section_is_about_nothing() -> None:
    assert set(re.findall(r"^## moesaic (\w+)$", CLI_PAGE, re.MULTILINE)) == set(COMMANDS)


def test_the_options_of_what_reads_text_are_all_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("generate", "eval", "inspect"):
        assert run([name, "--help"]) == 0
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
        assert options - {"--help"} <= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", section(name)))


PAGES = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
DIRECTIVES = set(re.findall(r"^::: ([\w.]+)$", PAGES, re.MULTILINE))
PACKAGES = ("routing", "experts", "autotune", "parallel", "hf", "data", "inspect", "adapters", "serve", "convert")


def is_on_the_site(thing: object) -> bool:
    """Whether a class or function is shown: by a directive for itself, its module, or a package that lists it."""
    if not isinstance(thing, (type, FunctionType)):
        return False  # what is neither has no docstring of its own
    home, name = thing.__module__, thing.__qualname__
    listed = (f"moesaic.{package}" for package in PACKAGES if name in import_module(f"moesaic.{package}").__all__)
    return bool(thing.__doc__) and not DIRECTIVES.isdisjoint({home, f"{home}.{name}", *listed})


def test_every_part_that_a_name_chooses_is_on_the_site() -> None:
    from moesaic.experts import BACKENDS
    from moesaic.routing import BALANCERS, ROUTERS

    parts: list[type] = [registry.get(name) for registry in (ROUTERS, BALANCERS) for name in registry]
    parts += [type(BACKENDS.get(name)) for name in BACKENDS]
    assert len(parts) >= 7
    assert [part for part in parts if not is_on_the_site(part)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_is_on_the_site(package: str) -> None:
    home = import_module(f"moesaic.{package}")
    assert home.__name__ in DIRECTIVES
    objects = {name: getattr(home, name) for name in home.__all__}
    shown = {name for name, thing in objects.items() if is_on_the_site(thing) or f"`moesaic.{package}.{name}`" in PAGES}
    assert shown == set(home.__all__)
    # The site shows a submodule instead of a function with its name.
    assert {module.name for module in pkgutil.iter_modules(home.__path__)}.isdisjoint(home.__all__)


def test_every_name_of_the_front_door_is_on_the_site() -> None:
    things = {name: getattr(moesaic, name) for name in moesaic.__all__}
    modules = {thing.__name__ for thing in things.values() if isinstance(thing, ModuleType)}
    assert modules <= DIRECTIVES
    objects = {name: thing for name, thing in things.items() if not isinstance(thing, ModuleType)}
    assert [name for name, thing in objects.items() if not is_on_the_site(thing)] == []


@pytest.mark.parametrize("name", sorted(DIRECTIVES))
def test_what_a_page_shows_exists(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_picture_names_every_floor() -> None:
    from tests.test_architecture import FLOORS

    picture = (ROOT / "docs" / "assets" / "house.svg").read_text()
    names = set(re.findall(r"[a-z]+", " ".join(re.findall(r'class="name[^>]*>([^<]+)<', picture))))
    assert {name for floor in FLOORS for name in floor} - {
        "after_import",
        "eager",
        "few_tokens",
        "folders",
        "__main__",
    } <= names


def test_the_table_of_recipe_keys_is_that_of_the_recipe() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "recipe_table.py"))
    for page, text in script["pages"]().items():
        assert page.read_text() == text, "run scripts/recipe_table.py"
