"""What ``--data`` names -> files -> one corpus."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic.data.documents import Corpus, SourceFile
from moesaic.data.files import READERS, read_file
from moesaic.data.stdlib import find_library, read_library
from moesaic.errors import DataError

STDLIB = "stdlib"


def load_corpus(sources: Sequence[str] = (STDLIB,)) -> Corpus:
    """Read documents from ``sources``: each ``"stdlib"``, ``PATH`` or ``DOMAIN=PATH``.

    ``"stdlib"`` is Python's own standard library (domains ``code`` and ``prose``, no download). ``PATH`` is a
    file, or a folder that is walked without hidden entries, of ``.txt``, ``.md``, ``.py``, ``.jsonl`` (field
    ``text``) or ``.parquet`` (column ``text``), where every row is a document. The
    domain of a bare ``PATH`` is its last component without the extension. Line ends become ``\\n`` and a
    byte-order mark is dropped; a text that occurs twice (white space aside) is kept once. What cannot be read
    is skipped and listed in ``Corpus.skipped``.

    Raises :class:`DataError` for a missing path, a file of another type, and a corpus that is empty after
    all; :class:`MissingDependencyError` for ``.parquet`` without pyarrow.
    """
    return read_corpus(scan(sources))


def read_corpus(source_files: Sequence[SourceFile]) -> Corpus:
    """The documents of the files that :func:`scan` found."""
    library = [file for file in source_files if file.library]
    own = (read_file(file) for file in source_files if not file.library)
    corpus = Corpus([])
    corpus.extend(itertools.chain(read_library(library) if library else (), *own))
    if not corpus.documents:
        reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in corpus.skipped[:3])
        raise DataError(
            f"the corpus is empty: of {len(source_files)} files none holds usable text"
            + (f" ({reasons})" if reasons else "")
        )
    return corpus


def scan(sources: Sequence[str]) -> list[SourceFile]:
    """All files that ``sources`` name, in a fixed order, each with a name of its own; none is opened."""
    if not sources:
        raise DataError("no data is named: give 'stdlib', PATH or DOMAIN=PATH")
    found: list[SourceFile] = []
    names: set[tuple[str, str]] = set()
    for source in dict.fromkeys(sources):
        for file in _files_of(source):
            # Two folders may have one name: number the later one, so that no document shadows another.
            name, copies = file.name, 1
            while (file.domain, name) in names:
                copies += 1
                name = f"{file.name}~{copies}"
            names.add((file.domain, name))
            found.append(SourceFile(file.domain, name, file.path, file.library))
    return found


def _files_of(source: str) -> Iterator[SourceFile]:
    if source == STDLIB:
        yield from find_library()
        return
    domain, path = _split_source(source)
    if not path.exists():
        raise DataError(f"data path {str(path)!r} does not exist; allowed: 'stdlib', PATH or DOMAIN=PATH")
    top = path.resolve()
    domain = domain or re.sub(r"[^\w.-]+", "_", top.stem if top.is_file() else top.name) or "data"
    if top.is_dir():
        yield from _walk(domain, top)
    elif path.suffix.lower() not in READERS:
        raise DataError(f"cannot read {str(path)!r}: its type is not one of {', '.join(READERS)}")
    else:
        yield SourceFile(domain, path.name, path)


def _split_source(source: str) -> tuple[str | None, Path]:
    domain, equals, path = source.partition("=")
    # A path that exists may hold an equals sign itself.
    if not equals or Path(source).exists():
        return None, Path(source)
    if not re.fullmatch(r"[\w.-]+", domain):
        raise DataError(f"bad domain {domain!r} in {source!r}: letters, digits, '_', '.' and '-' are allowed")
    if not path:
        raise DataError(f"no path after '=' in {source!r}")
    return domain, Path(path)


def _walk(domain: str, top: Path) -> Iterator[SourceFile]:
    found = False

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot list folder {error.filename!r}: {error.strerror}")

    for folder, subfolders, names in os.walk(top, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in READERS:
                found = True
                yield SourceFile(domain, f"{top.name}/{path.relative_to(top).as_posix()}", path)
    if not found:
        raise DataError(f"folder {str(top)!r} has no file of the types {', '.join(READERS)}")
