"""Text <-> token ids: train a byte-level BPE tokenizer, load one, and check that it fits a model."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.data.documents import Document
from moesaic.errors import CheckpointError, ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257
"""256 bytes and the end-of-text token: with fewer, some text could not be written."""

# The expression of GPT-4's tokenizer: words take one space before them, digits come in groups of at most three,
# runs of white space stay together up to the last one, which belongs to the word (indentation of code is one token).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int = 4096, *, sample_bytes: int = 16_000_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most ``vocab_size`` entries (fewer when the text is short).

    Any text comes back unchanged from ``decode(encode(text))``. ``<|endoftext|>`` (id 0) is at once the token that
    begins, ends and pads a text: a document ends with it, so what follows it begins one. No token is added
    by a call on its own. The same documents give the same tokenizer, whatever their order. Merges are learned
    from about ``sample_bytes`` bytes, shared out evenly over the domains.

    Source: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2, input representation.
    Raises :class:`ConfigError` for a ``vocab_size`` under 257, :class:`DataError` without documents.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(f"vocab_size is {vocab_size}; allowed: {SMALLEST_VOCAB} or more (256 bytes and {END_OF_TEXT})")
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
    tokenizer.train_from_iterator(sample(documents, sample_bytes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
