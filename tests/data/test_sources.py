"""What is read, what is left out and why, and which sources are refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from moesaic.data import Corpus, load_corpus
from moesaic.data.documents import text_digest
from moesaic.errors import DataError, MissingDependencyError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents}


def row(file: str, text: str) -> str:
    return f"{file}#{text_digest(text).hex()[:16]}"


def reasons(corpus: Corpus) -> dict[str, str]:
    return {os.path.basename(skip.path): skip.reason for skip in corpus.skipped}


def test_a_folder_gives_all_formats_and_relative_names(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write(folder / "a.txt", "plain text")
    write(folder / "sub" / "b.md", "# title")
    write(folder / "c.py", "x = 1\n")
    write(folder / "d.jsonl", '{"text": "first", "id": 7}\n\n{"text": "second"}\n')
    write(folder / "e.csv", "not,read")
    write(folder / ".hidden" / "f.txt", "hidden")
    corpus = load_corpus([str(folder)])
    assert texts(corpus) == {
        "corpus/a.txt": "plain text",
        "corpus/c.py": "x = 1\n",
        row("corpus/d.jsonl", "first"): "first",
        row("corpus/d.jsonl", "second"): "second",
        "corpus/sub/b.md": "# title",
    }
    assert corpus.domains == ["corpus"]
    assert not corpus.skipped


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "tables"
    folder.mkdir()
    parquet.write_table(arrow.table({"text": ["one", None, "two", " "], "n": [1, 2, 3, 4]}), folder / "a.parquet")
    parquet.write_table(arrow.table({"body": ["x"]}), folder / "b.parquet")
    write(folder / "c.parquet", b"PAR1 but nothing of the kind")
    corpus = load_corpus([str(folder)])
    assert texts(corpus) == {row("tables/a.parquet", text): text for text in ("one", "two")}
    found = reasons(corpus)
    assert found["a.parquet:2"] == "'text' is NoneType, not a string"
    assert found["a.parquet:4"] == "empty"
    assert found["b.parquet"] == "no column 'text'"
    assert found["c.parquet"].startswith("not a readable parquet file (")
    assert len(found) == 4


def test_parquet_without_pyarrow_names_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"pip install 'moesaic\[parquet\]'"):
        load_corpus([str(path)])


def test_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my notes" / "a.txt", "one")
    write(tmp_path / "poem.v2.txt", "two")
    write(tmp_path / "x=y" / "b.txt", "three")
    monkeypatch.chdir(tmp_path)
    corpus = load_corpus(["my notes", "poem.v2.txt", "x=y", f"named={tmp_path / 'x=y'}"])
    assert {(d.domain, d.name) for d in corpus.documents} == {
        ("my_notes", "my notes/a.txt"),
        ("poem.v2", "poem.v2.txt"),
        ("x_y", "x=y/b.txt"),
    }
    assert corpus.duplicates == 1  # the same file again, under the name "named"
    monkeypatch.chdir(tmp_path / "my notes")
    assert load_corpus(["."]).domains == ["my_notes"]
    assert load_corpus(["letters=a.txt"]).domains == ["letters"]


def test_two_folders_with_one_name_keep_all_documents(tmp_path: Path) -> None:
    for parent, text in (("p", "one"), ("q", "two")):
        write(tmp_path / parent / "data" / "a.txt", text)
    corpus = load_corpus([str(tmp_path / "p" / "data"), str(tmp_path / "q" / "data")])
    assert texts(corpus) == {"data/a.txt": "one", "data/a.txt~2": "two"}


def test_bad_files_are_skipped_with_their_reason(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    write(tmp_path / "binary.txt", b"\x7fELF\0\1")
    write(tmp_path / "latin.txt", "café".encode("latin-1"))
    write(tmp_path / "empty.md", "")
    write(tmp_path / "blank.py", " \n\t\n")
    write(tmp_path / "none.jsonl", "\n\n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    corpus = load_corpus([str(tmp_path)])
    assert [document.text for document in corpus.documents] == ["good"]
    assert reasons(corpus) == {
        "binary.txt": "binary (it holds NUL bytes)",
        "latin.txt": "not UTF-8 (byte 0xe9 at offset 3)",
        "empty.md": "empty",
        "blank.py": "empty",
        "none.jsonl": "empty",
        "gone.txt": "cannot be read: No such file or directory",
        "pipe.txt": "not a regular file",
    }


def test_a_file_without_permission_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "good.txt", "good")
    secret = write(tmp_path / "secret.txt", "secret")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:  # root may read everything, so that chmod would not do
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert reasons(load_corpus([str(tmp_path)])) == {"secret.txt": "cannot be read: Permission denied"}


def test_bad_json_lines_are_counted_by_kind(tmp_path: Path) -> None:
    lines: list[bytes] = [
        b'{"text": "good"}',
        b"{",
        b"[1]",
        b'{"body": "x"}',
        b'{"text": 3}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b'{"text": "caf\xe9"}',
        b"not json",
        b"[" * 100_000,
        b'{"text": "also good"}',
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    corpus = load_corpus([str(path)])
    assert texts(corpus) == {row("a.jsonl", text): text for text in ("good", "also good")}
    found = reasons(corpus)
    assert set(found) == {f"a.jsonl:{row}" for row in (2, 3, 5, 6, 7, 8)}
    assert found["a.jsonl:2"].endswith("), and 2 more rows like it")
    assert found["a.jsonl:3"] == "no field 'text', and 1 more rows like it"
    assert found["a.jsonl:5"] == "'text' is int, not a string"
    assert found["a.jsonl:7"] == "not valid Unicode (a lone surrogate)"
    assert sum(skip.count for skip in corpus.skipped) == 9


def test_line_ends_and_byte_order_marks(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    write(tmp_path / "b.jsonl", json.dumps({"text": "four\r\nfive"}))
    assert [d.text for d in load_corpus([str(tmp_path)]).documents] == ["one\ntwo\nthree\n", "four\nfive"]


def test_copies_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "the same\n  text")
    write(tmp_path / "b.txt", "the same text\n\n")
    write(tmp_path / "c.jsonl", '{"text": "the same text"}\n{"text": "another"}\n')
    corpus = load_corpus([str(tmp_path), f"again={tmp_path / 'b.txt'}"])
    assert sorted(d.text for d in corpus.documents) == ["another", "the same\n  text"]
    assert corpus.duplicates == 3
    assert not corpus.skipped


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"data path 'nowhere' does not exist"),
        ("code=nowhere", r"data path 'nowhere' does not exist"),
        ("code=", r"no path after '='"),
        ("a b=empty.txt", r"bad domain 'a b'"),
        ("=empty.txt", r"bad domain ''"),
        ("table.csv", r"cannot read 'table.csv': its type is not one of .txt, .md, .py, .jsonl, .parquet"),
        ("bare", r"folder '.*bare' has no file of the types .txt"),
        ("empty.txt", r"the corpus is empty: of 1 files none holds usable text \(empty.txt: empty\)"),
    ],
)
def test_refused_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    write(tmp_path / "table.csv", "a,b")
    write(tmp_path / "empty.txt", "")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus([source])
    assert "\n" not in str(caught.value)


def test_no_sources() -> None:
    with pytest.raises(DataError, match="no data is named"):
        load_corpus([])
