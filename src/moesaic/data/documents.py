"""The nouns of this floor: a document, a file that was left out, and the corpus that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is relative and stable (no absolute path), and unique within its domain.

    What stands before ``"::"`` in a name is the file that the text came from: the split hangs on it, so that
    all documents that one file gave (``"stdlib/ast.py"``, ``"stdlib/ast.py::docstrings"``) stay on one side. A
    row of a ``.jsonl`` or ``.parquet`` file counts as a file of its own: ``"notes.jsonl#"`` and a digest of its
    text, in which white space does not count.
    """

    domain: str
    name: str
    text: str

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]


@dataclass(frozen=True)
class Skipped:
    """Something that could not be read; ``count`` texts of one file may share one reason."""

    path: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class SourceFile:
    """A file that a source names, not read yet. ``library`` files are Python's own and give two domains."""

    domain: str
    name: str
    path: Path
    library: bool = False


@dataclass
class Corpus:
    """Documents in reading order, each text once; ``duplicates`` counts those left out as copies."""

    documents: list[Document]
    skipped: list[Skipped] = field(default_factory=list)
    duplicates: int = 0

    @property
    def domains(self) -> list[str]:
        return sorted({document.domain for document in self.documents})

    def extend(self, items: Iterable[Document | Skipped]) -> None:
        """Take in documents and skipped files; a copy of a text (white space aside) is only counted."""
        seen = {text_digest(document.text) for document in self.documents}
        for item in items:
            if isinstance(item, Skipped):
                self.skipped.append(item)
                continue
            digest = text_digest(item.text)
            if digest in seen:
                self.duplicates += 1
            else:
                seen.add(digest)
                self.documents.append(item)


def text_digest(text: str) -> bytes:
    """128 bits that two texts share when they differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def name_position(name: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a name: an order of documents that no other document
    changes.
    """
    # File names need not be valid Unicode.
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
