"""One file of a known format -> documents, or the reason why not: nothing in here raises for bad content."""

from __future__ import annotations

import importlib
import json
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from moesaic.data.documents import Document, Skipped, SourceFile, text_digest
from moesaic.errors import MissingDependencyError

FIELD = "text"
"""The field of a JSON line, and the column of a parquet file, that holds the text."""


def read_file(file: SourceFile) -> Iterator[Document | Skipped]:
    """All documents of one file. Content that cannot be used comes out as :class:`Skipped`.

    Raises :class:`MissingDependencyError` for a parquet file without pyarrow.
    """
    try:
        # Opening a pipe or a device would wait for ever, so the kind of file is asked for first.
        if not stat.S_ISREG(file.path.stat().st_mode):
            yield Skipped(str(file.path), "not a regular file")
            return
        yield from READERS[file.path.suffix.lower()](file)
    except OSError as error:
        yield Skipped(str(file.path), f"cannot be read: {error.strerror or error}")


def decode(data: bytes) -> str:
    """UTF-8 bytes -> text with ``\\n`` line ends and no byte-order mark; :class:`ValueError` says why not."""
    if b"\0" in data:
        raise ValueError("binary (it holds NUL bytes)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_plain(file: SourceFile) -> Iterator[Document | Skipped]:
    try:
        text = decode(file.path.read_bytes())
        if not text.strip():
            raise ValueError("empty")
    except ValueError as error:
        yield Skipped(str(file.path), str(error))
    else:
        yield Document(file.domain, file.name, text)


def _read_json_lines(file: SourceFile) -> Iterator[Document | Skipped]:
    faults = _Faults(file)
    blank = True
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            blank = False
            try:
                text = _usable(_json_text(decode(line)))
            except ValueError as error:
                faults.add(number, str(error))
            else:
                yield _row(file, text)
    yield from faults.skipped()
    if blank:
        yield Skipped(str(file.path), "empty")


def _json_text(line: str) -> object:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    if not isinstance(record, dict) or FIELD not in record:
        raise ValueError(f"no field {FIELD!r}")
    return record[FIELD]


def _read_parquet(file: SourceFile) -> Iterator[Document | Skipped]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingDependencyError(f"reading {file.path} needs pyarrow: pip install 'moesaic[parquet]'") from error
    faults = _Faults(file)
    try:
        with parquet.ParquetFile(file.path) as table:
            if FIELD not in table.schema_arrow.names:
                raise ValueError(f"no column {FIELD!r}")
            if table.metadata.num_rows == 0:
                raise ValueError("empty")
            values = (value for batch in table.iter_batches(columns=[FIELD]) for value in batch.column(0))
            for number, value in enumerate(values, start=1):
                try:
                    text = _usable(value.as_py())
                except ValueError as error:
                    faults.add(number, str(error))
                else:
                    yield _row(file, text)
    except arrow.ArrowException as error:
        yield Skipped(str(file.path), f"not a readable parquet file ({str(error).splitlines()[0]})")
    except ValueError as error:
        yield Skipped(str(file.path), str(error))
    yield from faults.skipped()


def _row(file: SourceFile, text: str) -> Document:
    """A document that is named by what it says: a row inserted before it leaves it on its side of the split."""
    return Document(file.domain, f"{file.name}#{text_digest(text).hex()[:16]}", text)


def _usable(text: object) -> str:
    """A text of a record, if it can be tokenized; :class:`ValueError` says why not."""
    if not isinstance(text, str):
        raise ValueError(f"{FIELD!r} is {type(text).__name__}, not a string")
    if not text.strip():
        raise ValueError("empty")
    try:
        # JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes.
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode (a lone surrogate)") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Faults:
    """The bad rows of one file, by kind of fault: one line in a report instead of a million."""

    def __init__(self, file: SourceFile) -> None:
        self.path = str(file.path)
        self.first: dict[str, tuple[int, str]] = {}
        self.count: Counter[str] = Counter()

    def add(self, row: int, reason: str) -> None:
        kind = reason.partition(" (")[0]
        self.first.setdefault(kind, (row, reason))
        self.count[kind] += 1

    def skipped(self) -> Iterator[Skipped]:
        for kind, (row, reason) in self.first.items():
            count = self.count[kind]
            more = f", and {count - 1} more rows like it" if count > 1 else ""
            yield Skipped(f"{self.path}:{row}", reason + more, count)


READERS: dict[str, Callable[[SourceFile], Iterator[Document | Skipped]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".py": _read_plain,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
"""The formats, by file name extension."""
