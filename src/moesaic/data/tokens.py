"""Sources -> memory-mapped tokens: everything between a corpus and a batch, done once and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from transformers import PreTrainedTokenizerBase

from moesaic.data.cache import Cache
from moesaic.data.documents import Corpus, Document, Skipped, SourceFile
from moesaic.data.sources import read_corpus, scan
from moesaic.data.split import split_corpus
from moesaic.data.tokenizer import (
    encode_documents,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
    wrap_trained,
)

FORMAT = 2
"""Raised whenever documents, split, tokenizer or files come out differently, so that old entries are not
found.
"""

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids [n], uint16 or uint32, memory-mapped and read-only."""

RACY_NS = 2_000_000_000
"""Nanoseconds. Times of file systems tick every few milliseconds, on some every two seconds."""

TOKENIZER = "tokenizer.json"
SIDES = ("train", "validation")


@dataclass(frozen=True)
class Count:
    """What one side of one domain holds. ``bytes`` are of UTF-8 text; ``tokens`` include one end per
    document.
    """

    documents: int
    bytes: int
    tokens: int


@dataclass
class TokenData:
    """Tokens by domain. ``counts[side][domain]`` has the sizes; ``fingerprint`` is equal for equal tokens."""

    tokenizer: PreTrainedTokenizerBase
    train: dict[str, TokenArray]
    validation: dict[str, TokenArray]
    skipped: list[Skipped]
    duplicates: int
    counts: dict[str, dict[str, Count]]
    fingerprint: str

    @property
    def domains(self) -> list[str]:
        return sorted(self.train)

    @property
    def vocab_size(self) -> int:
        return vocabulary_size(self.tokenizer)


def prepare(
    sources: Sequence[str] = ("stdlib",),
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    cache_dir: str | Path | None = None,
) -> TokenData:
    """Read, split and tokenize ``sources`` (see :func:`load_corpus`), or open what an earlier call made.

    ``tokenizer`` is a folder or a name (see :func:`load_tokenizer`), or one that is loaded already; None trains one
    of ``vocab_size`` entries on the training documents. Documents follow each other by domain and name, each
    ended by the end-of-text token.

    The cache (default: ``$MOESAIC_CACHE`` or ``~/.cache/moesaic``) is keyed by the documents, the tokenizer
    and the settings. Files whose size and times are unchanged are not read again. Any number of processes may
    start at once: one does the work. Damaged entries are made anew.

    Raises :class:`DataError` for bad sources, a full or unwritable disk, a tokenizer without end-of-text
    token; :class:`CheckpointError` for a missing or broken tokenizer; :class:`ConfigError` for a setting out
    of range.
    """
    cache = Cache(cache_dir)
    chosen = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    trained = f"{vocab_size}, tokenizers {tokenizers.__version__}"
    settings = {
        "format": FORMAT,
        "validation_fraction": validation_fraction,
        "tokenizer": trained if chosen is None else tokenizer_fingerprint(chosen),
    }
    files = scan(sources)
    scan_key, is_settled = _scan_key(files, settings)
    found = _recall(cache, scan_key, chosen)
    if found:
        return found
    with cache.lock(scan_key):
        # Whoever waited here finds the work done.
        found = _recall(cache, scan_key, chosen)
        if found:
            return found
        corpus = read_corpus(files)
        key = _content_key(corpus, settings)

        def write(folder: Path) -> dict[str, Any]:
            return _write(folder, corpus, chosen, vocab_size, validation_fraction)

        about = cache.build(key, write)
        if is_settled:
            skipped = [dataclasses.asdict(skip) for skip in corpus.skipped]
            cache.remember(scan_key, {"key": key, "skipped": skipped, "duplicates": corpus.duplicates})
    return _open(cache.entry(key), about, chosen, corpus.skipped, corpus.duplicates)


def _scan_key(files: Sequence[SourceFile], settings: Mapping[str, object]) -> tuple[str, bool]:
    """A key of the files' names, sizes and times, and whether these tell enough to be relied on.

    A file that was written a moment ago may be written again within one tick of the file system's clock, to
    the same size; such a scan must not be remembered (git calls such an index entry racy).
    """
    now = time.time_ns()
    newest = 0
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([settings, sys.version]).encode())
    for file in files:
        digest.update(repr((file.domain, file.name, str(file.path), file.library)).encode())
        try:
            status = os.stat(file.path)
        except OSError as error:
            digest.update(repr(error.errno).encode())
            continue
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(
            repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_mode)).encode()
        )
    return digest.hexdigest(), newest < now - RACY_NS


def _content_key(corpus: Corpus, settings: Mapping[str, object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(settings).encode())
    for document in sorted(corpus.documents, key=lambda document: (document.domain, document.name)):
        text = hashlib.blake2b(document.text.encode(), digest_size=16).hexdigest()
        digest.update(repr((document.domain, document.name, text)).encode())
    return digest.hexdigest()


def _recall(cache: Cache, scan_key: str, chosen: PreTrainedTokenizerBase | None) -> TokenData | None:
    note = cache.recall(scan_key)
    if note is None:
        return None
    try:
        skipped = [Skipped(**skip) for skip in note["skipped"]]
        key, duplicates = str(note["key"]), int(note["duplicates"])
    except (LookupError, TypeError, ValueError):  # damaged: as good as none
        return None
    about = cache.open(key)
    return None if about is None else _open(cache.entry(key), about, chosen, skipped, duplicates)


def _open(
    folder: Path,
    about: Mapping[str, Any],
    chosen: PreTrainedTokenizerBase | None,
    skipped: list[Skipped],
    duplicates: int,
) -> TokenData:
    arrays: dict[str, dict[str, TokenArray]] = {side: {} for side in SIDES}
    counts: dict[str, dict[str, Count]] = {side: {} for side in SIDES}
    for part in about["parts"]:
        side, domain = part["side"], part["domain"]
        arrays[side][domain] = np.memmap(folder / part["file"], dtype=about["dtype"], mode="r")
        counts[side][domain] = Count(**part["count"])
    if chosen is None:
        chosen = wrap_trained(tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)))
    return TokenData(
        tokenizer=chosen,
        train=arrays["train"],
        validation=arrays["validation"],
        skipped=skipped,
        duplicates=duplicates,
        counts=counts,
        fingerprint=about["fingerprint"],
    )


def _write(
    folder: Path,
    corpus: Corpus,
    chosen: PreTrainedTokenizerBase | None,
    vocab_size: int,
    validation_fraction: float,
) -> dict[str, Any]:
    """Write the files of one entry; returns what :func:`_open` needs to know about them."""
    train, validation = split_corpus(corpus, validation_fraction)
    if chosen is None:
        chosen = train_tokenizer(train, vocab_size)
        # Written here and not by the tokenizer itself, whose errors do not say that a disk is full.
        (folder / TOKENIZER).write_text(chosen.backend_tokenizer.to_str(), encoding="utf-8")
    dtype = "<u2" if vocabulary_size(chosen) <= 1 << 16 else "<u4"
    fingerprint = hashlib.blake2b(tokenizer_fingerprint(chosen).encode(), digest_size=16)
    parts: list[dict[str, Any]] = []
    for side, documents in zip(SIDES, (train, validation), strict=True):
        for domain in sorted({document.domain for document in documents}):
            members = [document for document in documents if document.domain == domain]
            name = f"{side}-{len(parts)}.bin"
            digest, tokens = _write_tokens(folder / name, chosen, members, dtype)
            count = Count(len(members), sum(len(d.text.encode()) for d in members), tokens)
            parts.append({"side": side, "domain": domain, "file": name, "count": dataclasses.asdict(count)})
            fingerprint.update(repr((side, domain, digest)).encode())
    return {"dtype": dtype, "parts": parts, "fingerprint": fingerprint.hexdigest()}


def _write_tokens(
    path: Path, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], dtype: str
) -> tuple[str, int]:
    """Returns a digest of the ids, and how many they are."""
    digest = hashlib.blake2b(digest_size=16)
    count = 0
    with path.open("wb") as file:
        for ids in encode_documents(tokenizer, documents):
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            count += len(ids)
    return digest.hexdigest(), count
