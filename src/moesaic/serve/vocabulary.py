"""What sampling and text need to know of a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data.tokenizer import tokenizer_fingerprint
from moesaic.hf.generation import end_ids


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model can choose among.

    Attributes:
        size: columns of the logits; at least the tokenizer's ids.
        end_ids: after one of these the model has no more to say.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    end_ids: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Of a loaded model; where it names no end tokens, the tokenizer's own."""
        ends = end_ids(model) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        vocabulary = cls(tokenizer, model.config.get_text_config().vocab_size, tuple(ends))
        vocabulary.key  # noqa: B018  # takes a moment, which no request should wait for
        return vocabulary

    @cached_property
    def key(self) -> Hashable:
        """Equal for vocabularies that say the same, with copies of one tokenizer, too."""
        return tokenizer_fingerprint(self.tokenizer), self.size, self.end_ids
