"""Train and validation: which side a document is on depends on the name of its file, or on the text of its row."""

from __future__ import annotations

from collections import defaultdict

from moesaic.data.documents import Corpus, Document, name_position
from moesaic.errors import ConfigError


def split_corpus(corpus: Corpus, validation_fraction: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Split into (train, validation), each sorted by domain and name.

    A file goes to validation when the hash of its name falls under ``validation_fraction``: the order of the
    documents and the other files do not matter, and all documents of one file go to one side. ``.jsonl`` and
    ``.parquet`` files are split by row, each by a digest of its text: a row that is inserted, removed or moved
    leaves the others where they are.

    Two exceptions, for small corpora: a domain with all of its documents on one side gives the one whose hash
    is nearest to the border to the other side, and a domain with one document only has that document's end cut
    off, at a line end where there is one, for validation.

    Raises :class:`ConfigError` unless ``0 < validation_fraction < 1``.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {validation_fraction}; allowed: between 0 and 1, both excluded")
    domains: defaultdict[str, list[Document]] = defaultdict(list)
    for document in sorted(corpus.documents, key=lambda document: (document.domain, document.name)):
        domains[document.domain].append(document)
    train: list[Document] = []
    validation: list[Document] = []
    for documents in domains.values():
        if len(documents) == 1:
            head, tail = _cut(documents[0], validation_fraction)
            train += head
            validation += tail
            continue
        held_out = {d.name for d in documents if name_position(d.file) < validation_fraction}
        if not held_out or len(held_out) == len(documents):
            # The whole name tells apart the documents that one file gave.
            ranked = sorted(documents, key=lambda d: (name_position(d.file), name_position(d.name), d.name))
            moved = ranked[0] if not held_out else ranked[-1]
            held_out ^= {moved.name}
        train += [d for d in documents if d.name not in held_out]
        validation += [d for d in documents if d.name in held_out]
    return train, validation


def _cut(document: Document, validation_fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    border = round(len(text) * (1 - validation_fraction))
    line_end = text.rfind("\n", 0, border) + 1
    # Only a line end nearby counts, or one long last line would move most of the text over.
    if line_end > border - len(text) * validation_fraction / 2:
        border = line_end
    head = [Document(document.domain, f"{document.name}::head", text[:border])] if text[:border].strip() else []
    tail = [Document(document.domain, f"{document.name}::tail", text[border:])] if text[border:].strip() else []
    return head, tail
