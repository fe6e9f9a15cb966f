"""What enters a dense model's feed-forwards on a text, one decoder layer in memory at a time.

T tokens · D model width · F hidden neurons · B passages at once · S their length.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from moesaic.convert.dense import DenseModel
from moesaic.convert.source import EMBEDDING, TensorSource, load_tokenizer
from moesaic.convert.writing import load_kept, save_atomically
from moesaic.data import split_corpus
from moesaic.errors import CheckpointError, DataError
from moesaic.experts.activations import ACTIVATIONS
from moesaic.inspect.passages import cut_passages, read_documents

_ROWS = 4096
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class CalibrationText:
    """``passages``: token ids, ``[S]`` int64 each; ``domains`` the domain of each one."""

    passages: tuple[Tensor, ...]
    domains: tuple[str, ...]

    def __len__(self) -> int:
        """The number of tokens T."""
        return sum(len(passage) for passage in self.passages)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains there are, sorted."""
        return tuple(sorted(set(self.domains)))

    def digest(self) -> str:
        """``"v1:"`` and 32 hexadecimal digits of all token ids, where passages begin, and their domains."""
        digest = hashlib.blake2b(repr([len(each) for each in self.passages]).encode(), digest_size=16)
        digest.update(repr(self.domains).encode())
        for passage in self.passages:
            digest.update(passage.contiguous().numpy().tobytes())
        return f"v1:{digest.hexdigest()}"

    def domain_ids(self) -> Tensor:
        """``[T]`` int64: the place in ``names`` of each token's domain."""
        lengths = torch.tensor([len(passage) for passage in self.passages])
        return torch.tensor([self.names.index(name) for name in self.domains]).repeat_interleave(lengths)


def read_text(
    source: TensorSource, data: Sequence[str], *, tokens: int, sequence_length: int, held_out: float
) -> CalibrationText:
    """About ``tokens`` tokens, evenly from every domain of ``data`` (see :func:`moesaic.data.load_corpus`).

    Args:
        held_out: share of the files that is left out, those by which ``moesaic eval`` judges a model.

    Raises:
        DataError: for sources that cannot be read, or without text.
        CheckpointError: where the model has no tokenizer, or one that does not fit.
    """
    tokenizer = load_tokenizer(source.tokenizer_from)
    corpus = read_documents(list(data))
    documents = split_corpus(corpus, held_out)[0] if held_out > 0 else corpus.documents
    if not documents:
        raise DataError(f"the text has no documents beside the share of {held_out} that is held out")
    cut = cut_passages(tokenizer, documents, max_tokens=tokens, sequence_length=sequence_length)
    if (highest := int(cut.token_ids.max())) >= source.config.vocab_size:
        raise DataError(
            f"the tokenizer does not fit the model: it gave the token id {highest}, "
            f"but the model's vocabulary has {source.config.vocab_size} entries"
        )
    ids = torch.from_numpy(cut.token_ids)
    return CalibrationText(
        tuple(ids[passage.start : passage.stop] for passage in cut.passages),
        tuple(passage.domain for passage in cut.passages),
    )


@dataclass
class FeedForward:
    """One layer's dense feed-forward, ``gate`` and ``up`` ``[F, D]`` and ``down`` ``[D, F]``, and what entered it:
    ``inputs`` ``[T, D]``."""

    layer: int
    gate: Tensor
    up: Tensor
    down: Tensor
    inputs: Tensor
    activation: str

    def release(self) -> None:
        """Let go of all tensors: before the next layer is read."""
        self.gate = self.up = self.down = self.inputs = torch.empty(0)

    def hidden(self, rows: slice) -> Tensor:
        """``[T', F]`` float32: the hidden neurons for some of the tokens.

        Raises:
            CheckpointError: where one is not finite.
        """
        x_TD = self.inputs[rows]
        both_TG = torch.cat([F.linear(x_TD, self.gate), F.linear(x_TD, self.up)], dim=1)
        hidden_TF = ACTIVATIONS.get(self.activation).apply(both_TG).float()
        check_finite(hidden_TF, self.layer, "the hidden neurons", both_TG.dtype)
        return hidden_TF

    def chunks(self) -> Iterator[slice]:
        """Rows of the tokens that are computed together."""
        for start in range(0, len(self.inputs), _TOKENS_AT_ONCE):
            yield slice(start, min(start + _TOKENS_AT_ONCE, len(self.inputs)))


def check_finite(values: Tensor, layer: int, what: str, dtype: torch.dtype) -> None:
    """Refuse a model that computes NaN or infinity.

    Raises:
        CheckpointError: where a value is not finite.
    """
    if not all(math.isfinite(value) for value in map(float, values.aminmax())):  # of NaN both are NaN
        raise CheckpointError(
            f"{what} of layer {layer + 1} (model.layers.{layer}) is not finite on the calibration text: weights there "
            f"or before are damaged, or too large for {str(dtype).removeprefix('torch.')}"
        )


@torch.no_grad()
def feed_forwards(
    model: DenseModel, text: CalibrationText, say: Callable[[str], None] | None = None, keep: Path | None = None
) -> Iterator[FeedForward]:
    """The feed-forward of each layer in turn, with what enters it; valid until the next one is asked for.

    transformers' own decoder layer computes, in the precision of the weights, with one layer's weights in memory and
    the hidden states of all tokens. Passages of like length go through it together, the shorter ones padded at their
    end, which no token before it sees.

    Args:
        keep: a file for the hidden states, which takes their place after each layer; where it is there already, the
            first layer is the one after the last that was done with.

    Raises:
        CheckpointError: where ``keep`` is damaged, or the model computes NaN or infinity.
    """
    kept = load_kept(keep) if keep is not None and keep.is_file() else None
    hidden_TD, first = (
        (token_embeddings(model, text), 0) if kept is None else (kept["hidden"].clone(), int(kept["layers"]))
    )
    del kept
    one = _OneLayer(model)
    try:
        for layer in range(first, model.num_layers):
            if say is not None:
                say(f"layer {layer + 1} of {model.num_layers}: reading its activations")
            found = FeedForward(layer, *one.load(layer), torch.empty_like(hidden_TD), model.activation)
            for places_BS, is_token_BS in _batches(text):
                own = places_BS[is_token_BS]
                after_BSD, x_BSD = one.run(hidden_TD[places_BS])
                hidden_TD[own], found.inputs[own] = after_BSD[is_token_BS], x_BSD[is_token_BS]
                del after_BSD, x_BSD  # before the next ones are computed
            check_finite(found.inputs, layer, "what enters the feed-forward", model.dtype)
            yield found
            found.release()
            if keep is not None:
                save_atomically({"hidden": hidden_TD, "layers": torch.tensor(layer + 1)}, keep)
    finally:
        one.release()


def _batches(text: CalibrationText) -> Iterator[tuple[Tensor, Tensor]]:
    """Passages that are computed together: the places of their tokens in the text, ``[B, S]``, and which of these are
    tokens; the others are padding."""
    lengths = torch.tensor([len(passage) for passage in text.passages])
    starts = lengths.cumsum(dim=0) - lengths
    left = lengths.argsort(descending=True, stable=True)
    while len(left):
        longest = int(lengths[left[0]])
        count = max(1, _TOKENS_AT_ONCE // longest)
        own, left = left[:count], left[count:]
        is_token_BS = torch.arange(longest) < lengths[own, None]
        yield (starts[own, None] + torch.arange(longest)) * is_token_BS, is_token_BS


def token_embeddings(model: DenseModel, text: CalibrationText) -> Tensor:
    """``[T, D]``: what enters the first layer."""
    known, places_T = torch.cat(text.passages).unique(return_inverse=True)
    return embedding_rows(model.source, known).to(model.dtype)[places_T]


def embedding_rows(source: TensorSource, ids: Tensor) -> Tensor:
    """``[n, D]``: the embeddings of distinct, sorted token ids, without the whole matrix in memory."""
    parts = []
    for start in range(0, source.shape(EMBEDDING)[0], _ROWS):
        here = ids[(ids >= start) & (ids < start + _ROWS)]
        if len(here):
            parts.append(source.read(EMBEDDING, slice(start, start + _ROWS))[here - start])
    return torch.cat(parts)


class _OneLayer:
    """transformers' model of the same architecture with a single decoder layer, into which each layer is loaded."""

    def __init__(self, model: DenseModel) -> None:
        self._model = model
        config = copy.deepcopy(model.source.config)
        config.num_hidden_layers = 1
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = list(kinds)[:1]  # all are alike: see check_dense
        with torch.device("meta"):
            self._one: Any = AutoModel.from_config(config, dtype=model.dtype, attn_implementation="sdpa").eval()
        self._one.rotary_emb = type(self._one.rotary_emb)(config=config)  # its frequencies are computed
        self._one.norm = nn.Identity()
        self._seen: list[Tensor] = []
        self._one.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))

    def load(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read the weights of a layer in the place of the last one's; returns those of its feed-forward."""
        self.release()
        source, prefix = self._model.source, f"model.layers.{layer}."
        ffn = self._model.ffn(layer)
        names = (*ffn, *self._model.others(layer))
        state = {name.removeprefix(prefix): source.read(name).to(self._model.dtype) for name in names}
        self._one.layers[0].load_state_dict(state, assign=True)
        gate, up, down = (state[name.removeprefix(prefix)] for name in ffn)
        return gate, up, down

    def release(self) -> None:
        """Hold no weights."""
        self._one.layers[0].to(device="meta")

    def run(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, D]``: what leaves the layer, and what enters its feed-forward."""
        self._seen.clear()
        after_BSD = self._one(inputs_embeds=hidden_BSD, use_cache=False).last_hidden_state
        return after_BSD, self._seen.pop()
