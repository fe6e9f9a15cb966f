"""Text <-> token ids: train a byte-level BPE tokenizer, load one, and check that it fits a model."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.data.documents import Document, name_position
from moesaic.errors import CheckpointError, ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257
"""256 bytes and the end-of-text token: with fewer, some text could not be written."""

# The expression of GPT-4's tokenizer: words take one space before them, digits come in groups of at most
# three, runs of white space stay together up to the last one, which belongs to the word (indentation of code
# is one token).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_PIECE = 1_000_000
"""Characters that are encoded at once; a longer text is cut after a line."""


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int = 4096, *, sample_size: int = 16_000_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most ``vocab_size`` entries (fewer when the text is short).

    Any text comes back unchanged from ``decode(encode(text))``. ``<|endoftext|>`` (id 0) is at once the token
    that begins, ends and pads a text: a document ends with it, so what follows it begins one. No token is
    added by a call on its own. The same documents give the same tokenizer, whatever their order. Merges are
    learned from about ``sample_size`` characters, shared out evenly over the domains.

    Source: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2, input representation.
    Raises :class:`ConfigError` for a ``vocab_size`` under 257, :class:`DataError` without documents.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab_size is {vocab_size}; allowed: {SMALLEST_VOCAB} or more (256 bytes and {END_OF_TEXT})"
        )
    if not documents:
        raise DataError("there is no document to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, sample_size), trainer)
    return wrap_trained(tokenizer)


def wrap_trained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The transformers tokenizer around what :func:`train_tokenizer` trained."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, or by name from the local Hugging Face cache; the network is never asked.

    Raises :class:`CheckpointError` when there is none, or when it cannot be read.
    """
    folder = Path(name_or_path)
    if not folder.exists():
        folder = _downloaded(str(name_or_path))
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer path {str(folder)!r} is a file; name the folder that it is in")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        usable = len(tokenizer) > 1 and bool(tokenizer("a b", add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust reader raises plain Exception, transformers nearly everything else
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {str(folder)!r} cannot be read: {reason}") from error
    if not usable:
        raise CheckpointError(f"no tokenizer in {str(folder)!r}: it needs a tokenizer.json or a vocabulary file")
    return cast(PreTrainedTokenizerBase, tokenizer)


def _downloaded(name: str) -> Path:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"no tokenizer {name!r}: it is no folder, and no name in the Hugging Face cache "
            "(to fetch one by name: hf download NAME)"
        ) from None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for this tokenizer: the largest id, added tokens included, plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def check_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise :class:`DataError` when the tokenizer has ids that a model with ``vocab_size`` rows lacks."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise DataError(
            f"the tokenizer does not fit the model: its ids go up to {needed - 1}, "
            f"the model's vocabulary has {vocab_size} entries (allowed ids: 0 to {vocab_size - 1})"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of what a tokenizer does to text; equal for a tokenizer that was saved and loaded again."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        state = tokenizer.backend_tokenizer.to_str()
    else:
        state = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    state += f"|{tokenizer.eos_token_id}"
    return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> Iterator[npt.NDArray[np.int64]]:
    """Token ids of ``documents``, an end-of-text token after each, in runs of any length [n].

    Texts are encoded as they stand: no token is added at their start, nothing is cut off, and a special token
    that is spelled out in a text becomes that token (so a file that separates its stories by
    ``<|endoftext|>`` means what it says). Raises :class:`DataError` for a tokenizer without an end-of-text
    token.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError("the tokenizer has no end-of-text token (eos_token): documents cannot be told apart")
    encode = _encoder(tokenizer)
    for texts, ends in _in_runs(documents):
        pieces = []
        for ids, is_end in zip(encode(texts), ends, strict=True):
            pieces.append(np.asarray([*ids, end] if is_end else ids, dtype=np.int64))
        yield np.concatenate(pieces)


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], Iterable[list[int]]]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return lambda texts: [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    # A copy, because the settings for cutting and padding live inside the tokenizer and belong to its owner.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _in_runs(documents: Sequence[Document]) -> Iterator[tuple[list[str], list[bool]]]:
    """(texts, whether a document ends with the text), a few megabytes at a time: encodings are far larger
    than their text, so memory is what limits a run."""
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for document in documents:
        pieces = list(_pieces(document.text, LONGEST_PIECE))
        for number, piece in enumerate(pieces, start=1):
            texts.append(piece)
            ends.append(number == len(pieces))
            size += len(piece)
            if size >= 4 * LONGEST_PIECE:
                yield texts, ends
                texts, ends, size = [], [], 0
    if texts:
        yield texts, ends


def _pieces(text: str, longest: int) -> Iterator[str]:
    """``text`` in pieces of at most ``longest`` characters, cut after a line end where there is one."""
    start = 0
    while len(text) - start > longest:
        cut = text.rfind("\n", start, start + longest) + 1
        cut = cut or start + longest
        yield text[start:cut]
        start = cut
    yield text[start:]


def _sample(documents: Sequence[Document], sample_size: int) -> Iterator[str]:
    """Texts of about ``sample_size`` in all, from every domain alike, in an order that the names give."""
    domains: defaultdict[str, list[Document]] = defaultdict(list)
    for document in documents:
        domains[document.domain].append(document)
    left = sample_size
    # The smallest domain first: what it leaves of its share goes to the larger ones.
    sizes = {name: sum(len(d.text) for d in members) for name, members in domains.items()}
    for number, name in enumerate(sorted(domains, key=lambda name: (sizes[name], name))):
        share = left // (len(domains) - number)
        left -= min(share, sizes[name])
        members = domains[name]
        if sizes[name] > share:
            members = sorted(members, key=lambda d: (name_position(d.name), d.name))
        for text in (piece for d in members for piece in _pieces(d.text, LONGEST_PIECE)):
            yield text[:share]
            share -= len(text)
            if share <= 0:
                break
