"""Which text goes through the model: documents to tokenized passages, every domain alike."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from moesaic.data import Corpus, Document, load_corpus, split_corpus
from moesaic.data.documents import name_position
from moesaic.errors import ConfigError, DataError
from moesaic.inspect.trace import IntArray, Passage

CHARACTERS_PER_TOKEN = 32
"""Far more than a token has on average: of a document that is longer than all wanted tokens times this, the end
is not even tokenized."""


def read_documents(sources: Sequence[str], held_out: float | None = None) -> Corpus:
    """The documents of ``sources`` (see :func:`moesaic.data.load_corpus`), or only those that training holds out.

    Args:
        held_out: the share of the files that training held out; None for all documents.

    Raises:
        DataError: for sources that cannot be read, or without text.
    """
    corpus = load_corpus(sources)
    if held_out is not None:
        corpus.documents = split_corpus(corpus, held_out)[1]
    return corpus


@dataclass
class TokenizedText:
    """``token_ids`` ``[n]`` and gapless ``spans`` ``[n, 2]`` in ``text``, as in :class:`RoutingTrace`."""

    text: str
    token_ids: IntArray
    spans: IntArray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class TokenizedPassages:
    """Passages, and the tokens of all of them, one after the other."""

    passages: list[Passage]
    token_ids: IntArray
    spans: IntArray


def cut_passages(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    max_tokens: int,
    sequence_length: int,
) -> TokenizedPassages:
    """Passages of at most ``sequence_length`` tokens, about ``max_tokens`` in all, evenly from every domain.

    Documents take turns, in an order that hangs on nothing but their names, and give one passage at a time, the
    first one from anywhere in the document: what stands at the top of a file (licences, imports) is not what the
    file is like.

    Raises:
        ConfigError: for a number out of range.
        DataError: where the documents have no tokens.
    """
    for what, number in (("tokens", max_tokens), ("sequence length", sequence_length)):
        if number < 1:
            raise ConfigError(f"{what} is {number}: it must be at least 1")
    domains: defaultdict[str, list[Document]] = defaultdict(list)
    for document in documents:
        domains[document.domain].append(document)
    passages: list[Passage] = []
    ids: list[IntArray] = []
    spans: list[IntArray] = []
    stop = 0
    for domain in sorted(domains):
        left = max(1, max_tokens // len(domains))
        for document, piece in _take_turns(tokenizer, domains[domain], max_tokens, sequence_length):
            piece = _window(piece, 0, left)
            passages.append(Passage(domain, document.name, piece.text, stop, stop + len(piece)))
            ids.append(piece.token_ids)
            spans.append(piece.spans)
            stop += len(piece)
            left -= len(piece)
            if not left:
                break
    if not passages:
        raise DataError("the documents have no text: there is nothing to run through the model")
    return TokenizedPassages(passages, np.concatenate(ids), np.concatenate(spans))


def _take_turns(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], max_tokens: int, length: int
) -> Iterator[tuple[Document, TokenizedText]]:
    """Every window of every document once: one of each document, then a second one of each, and so on."""
    ordered = sorted(documents, key=lambda document: (name_position(document.name), document.name))
    tokenized: dict[str, TokenizedText] = {}
    for turn in itertools.count():
        exhausted = True
        for document in ordered:
            if document.name not in tokenized:
                tokenized[document.name] = tokenize(tokenizer, document.text[: max_tokens * CHARACTERS_PER_TOKEN])
            whole = tokenized[document.name]
            windows = -(-len(whole) // length)
            if turn < windows:
                exhausted = False
                number = (turn + _first_window(document.name, windows)) % windows
                yield document, _window(whole, number * length, length)
        if exhausted:
            return


def _first_window(name: str, windows: int) -> int:
    # Not by the position of the name itself: those of the documents that training holds out are all near 0.
    return int(name_position(f"first window of {name}") * windows)


def _window(whole: TokenizedText, start: int, length: int) -> TokenizedText:
    spans = whole.spans[start : start + length]
    first, last = int(spans[0, 0]), int(spans[-1, 1])
    return TokenizedText(whole.text[first:last], whole.token_ids[start : start + length], spans - first)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedText:
    """Tokens of a document as the model expects one, with its special tokens, and the characters of each."""
    if not tokenizer.is_fast:
        # No offsets: what the tokens say one by one is the text then.
        ids = tokenizer.encode(text, verbose=False)
        pieces = [str(tokenizer.decode([token])) for token in ids]
        ends = np.cumsum([0, *map(len, pieces)])
        return TokenizedText("".join(pieces), np.asarray(ids, dtype=np.int64), np.stack([ends[:-1], ends[1:]], axis=1))
    encoded = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # Each span begins where the one before it ended, and none goes back.
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends])[: len(ends)]
    return TokenizedText(text, np.asarray(encoded["input_ids"], dtype=np.int64), np.stack([starts, ends], axis=1))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, tokens: TokenizedPassages) -> dict[int, str]:
    """Text of every token id that occurs: what it stands for in a passage, or the tokenizer's own name for it.

    The latter where a token is no text of its own: special tokens, and bytes that are only a part of a character.
    """
    written: Counter[tuple[int, str]] = Counter()
    for passage in tokens.passages:
        ids = tokens.token_ids[passage.start : passage.stop].tolist()
        spans = tokens.spans[passage.start : passage.stop].tolist()
        written.update((token, passage.text[start:stop]) for token, (start, stop) in zip(ids, spans, strict=True))
    # The commonest one: at the start of a text, say, a token may be written without the space that it has elsewhere.
    commonest: dict[int, str] = {}
    for (token, piece), _ in written.most_common():
        commonest.setdefault(token, piece)
    return {token: _name(tokenizer, token, commonest[token]) for token in sorted(commonest)}


def _name(tokenizer: PreTrainedTokenizerBase, token: int, piece: str) -> str:
    if piece and "\ufffd" not in str(tokenizer.decode([token])):
        return piece
    return str(tokenizer.convert_ids_to_tokens(token))
