"""The site says what is true: every command has its section, and what it shows of a command exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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
    assert {name for floor in FLOORS for name in floor} - {"after_import", "__main__"} <= names


def test_the_table_of_recipe_keys_is_that_of_the_recipe() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "recipe_table.py"))
    assert (ROOT / "docs" / "recipes.md").read_text() == script["page"](), "run scripts/recipe_table.py"
