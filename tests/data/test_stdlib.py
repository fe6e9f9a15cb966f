"""The default corpus: what is in it, and that nothing is in it twice."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from moesaic.data import Corpus, Document, load_corpus, split_corpus
from moesaic.data.stdlib import Paragraphs, find_library, read_library
from moesaic.errors import DataError

MODULE = '''"""A module docstring that is long enough to be kept: it goes on and on, and on, and on, and on,
and on, until it has more characters than the shortest docstring that is kept.
"""

import os


class Empty(Exception):
    """Short."""


def compact(): "One line."


def both(x):
    "First."; y = 1

    return y  # naïve ↦ columns are counted in bytes


async def documented():
    r"""A docstring of a function, nested in nothing, that also is long enough to be kept, as it has far more
    characters than the shortest docstring that is kept.

        indented
    """

    if os.name:
        class Inner:
            """Inner."""

            attribute = """not a docstring"""
'''


def library_of(root: Path, **modules: str) -> dict[tuple[str, str], str]:
    for name, source in modules.items():
        (root / f"{name}.py").write_text(source)
    found = [d for d in read_library(find_library(root)) if isinstance(d, Document)]
    return {(d.domain, d.name): d.text for d in found}


def test_docstrings_leave_the_code_and_make_the_prose(tmp_path: Path) -> None:
    found = library_of(tmp_path, module=MODULE)
    code = found["code", "stdlib/module.py"]
    prose = found["prose", "stdlib/module.py::docstrings"]
    tree = ast.parse(code)
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    assert not any(ast.get_docstring(scope) for scope in scopes)
    assert [type(node).__name__ for node in tree.body] == [
        "Import", "ClassDef", "FunctionDef", "FunctionDef", "AsyncFunctionDef",
    ]  # fmt: skip
    assert code.startswith("import os\n")
    assert "class Empty(Exception):\n    pass\n" in code
    assert "def compact(): pass\n" in code
    assert "    pass; y = 1\n\n    return y  # naïve ↦" in code
    assert 'attribute = """not a docstring"""' in code
    first, second = prose.split("\n\nA docstring of a function")
    assert first.startswith("A module docstring")
    assert second.endswith("is kept.\n\n    indented")


def test_tables_and_files_with_nothing_but_a_docstring_are_no_code(tmp_path: Path) -> None:
    table = "NAMES = {\n" + "".join(f"    {n}: 'name {n}',\n" for n in range(100)) + "}\n"
    found = library_of(tmp_path, table=table, empty="", only='"""Docstring."""\n', one="def f():\n    'Doc'\n")
    assert [key for key in found if key[0] == "code"] == [("code", "stdlib/one.py")]


def test_paragraphs_that_were_seen_are_left_out() -> None:
    written = Paragraphs()
    long = "A paragraph that is long enough to be recognized when it comes again."
    other = "Another paragraph that is just as long, and that has other words in it."
    assert written.fresh(f"Title\n\n{long}") == f"Title\n\n{long}"
    assert written.fresh(long.replace(" ", "\n")) == ""
    assert written.fresh(f"Title\n\n{long}\n\n{other} {other}") == f"Title\n\n{other} {other}"


def test_a_broken_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text("def (:\n")
    found = list(read_library(find_library(tmp_path)))
    assert [item.path for item in found if not isinstance(item, Document)] == [str(tmp_path / "bad.py")]


def test_a_python_without_sources_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this Python has no sources of its standard library in"):
        find_library(tmp_path)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_the_default_corpus(corpus: Corpus) -> None:
    assert corpus.domains == ["code", "prose"]
    names = [(d.domain, d.name) for d in corpus.documents]
    assert len(set(names)) == len(names)
    text = {key: d.text for key, d in zip(names, corpus.documents, strict=True)}
    assert "class ArgumentParser" in text["code", "stdlib/argparse.py"]
    assert "Object for parsing command line strings" not in text["code", "stdlib/argparse.py"]
    assert "stdlib/test/support/__init__.py" not in {name for _, name in names}
    size = {domain: sum(len(d.text) for d in corpus.documents if d.domain == domain) for domain in corpus.domains}
    assert size["code"] > 4_000_000
    assert size["prose"] > 1_000_000
    train, validation = split_corpus(corpus)
    assert not {d.file for d in train} & {d.file for d in validation}
    for domain in corpus.domains:
        held_out = sum(len(d.text) for d in validation if d.domain == domain)
        assert 0.01 < held_out / size[domain] < 0.15


def test_no_long_paragraph_of_prose_is_in_two_documents_or_in_the_code(corpus: Corpus) -> None:
    owner: dict[str, str] = {}
    shared = 0
    for document in corpus.documents:
        if document.domain == "prose":
            for paragraph in document.text.split("\n\n"):
                words = " ".join(paragraph.split())
                if len(words) >= 80:
                    shared += owner.setdefault(words, document.name) != document.name
    assert len(owner) > 3000
    assert shared == 0
    code = " ".join(" ".join(d.text.split()) for d in corpus.documents if d.domain == "code")
    sampled = list(owner)[:: math.ceil(len(owner) / 200)]
    assert sum(words in code for words in sampled) <= 2  # a few sources quote their help text as a string
