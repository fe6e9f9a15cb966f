"""Whether models come from one base: only then do their weights mean the same, so that they can be merged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.convert.dense import DenseModel
from moesaic.convert.source import TensorSource, load_tokenizer
from moesaic.errors import CheckpointError

RELATED = 0.5
"""Least cosine between a matrix of a fine-tuned model and its base's. Fine-tuning leaves it above 0.9, even over many
steps; two models that were trained apart have about 0."""
_SETTINGS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
)
_ROWS = 256


def check_one_base(base: DenseModel, models: Sequence[DenseModel]) -> None:
    """Refuse models that were not fine-tuned from ``base``.

    They must have its architecture, the names and shapes of its tensors, its settings of attention and RoPE, and its
    tokens by the same ids. A model with the base's fingerprint is its own; one with another (its embedding was trained)
    must have matrices that point where the base's do.

    Raises:
        CheckpointError: which names the model and what differs.
    """
    fingerprint, tokens = base.source.fingerprint(), _token_ids(base.source)
    for model in models:
        where, of_base = repr(str(model.source.path)), f"the base {str(base.source.path)!r}"
        theirs, ours = model.source.config, base.source.config
        if theirs.model_type != ours.model_type:
            raise CheckpointError(
                f"{where} is a {theirs.model_type!r}, {of_base} a {ours.model_type!r}: models of one base"
            )
        _check_tensors(base, model, f"{where} cannot be merged with {of_base}")
        for name in _SETTINGS:
            mine, its = getattr(ours, name, None), getattr(theirs, name, None)
            if mine != its:
                raise CheckpointError(
                    f"{where} cannot be merged with {of_base}: {name} is {its!r} there, {mine!r} here"
                )
        _check_tokens(tokens, _token_ids(model.source), f"{where} cannot be merged with {of_base}")
        found = model.source.fingerprint()
        if found != fingerprint and (cosine := likeness(base, model)) < RELATED:
            raise CheckpointError(
                f"{where} was not fine-tuned from {of_base}: their fingerprints differ ({found}, {fingerprint}), and "
                f"their weights have nothing in common (cosine {cosine:.2f}, expected are {RELATED} and more)"
            )


def likeness(base: DenseModel, model: DenseModel) -> float:
    """The smallest cosine between a part of a matrix in both: rows of query and gate projections in the first, the
    middle and the last layer."""
    smallest = 1.0
    for layer in {0, base.num_layers // 2, base.num_layers - 1}:
        for name in (f"model.layers.{layer}.self_attn.q_proj.weight", base.ffn(layer).gate):
            a, b = (each.source.read(name, slice(0, _ROWS)).double() for each in (base, model))
            norms = math.sqrt(float(a.square().sum()) * float(b.square().sum()))
            smallest = min(smallest, float((a * b).sum()) / norms if norms else 0.0)
    return smallest


def tensors(model: DenseModel) -> list[str]:
    """The names of all its tensors, in the order of the layers."""
    names = list(model.outside())
    for layer in range(model.num_layers):
        names += [*model.others(layer), *model.ffn(layer)]
    return names


def _check_tensors(base: DenseModel, model: DenseModel, message: str) -> None:
    if model.num_layers != base.num_layers:
        raise CheckpointError(f"{message}: it has {model.num_layers} layers, the base has {base.num_layers}")
    for name in [*tensors(base), *tensors(model)]:
        if name not in model.source or name not in base.source:
            holder = "the base only" if name in base.source else "it only"
            raise CheckpointError(f"{message}: {name} is in {holder}")
        theirs, ours = model.source.shape(name), base.source.shape(name)
        if theirs != ours:
            raise CheckpointError(f"{message}: {name} has shape {list(theirs)} there, {list(ours)} in the base")


def _check_tokens(ours: Mapping[int, str], theirs: Mapping[int, str], message: str) -> None:
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise CheckpointError(
                f"{message}: their tokenizers differ, the id {number} is {theirs[number]!r} there, {ours[number]!r} in "
                "the base"
            )


def _token_ids(source: TensorSource) -> dict[int, str]:
    """Id to token; empty where the model has no tokenizer to compare."""
    path = source.tokenizer_from / "tokenizer.json"
    if not path.is_file():
        try:
            vocabulary = load_tokenizer(source.tokenizer_from).get_vocab()
        except CheckpointError:
            return {}
        return {int(number): str(token) for token, number in vocabulary.items()}
    # Read by itself: that takes a tenth of the time, and says which file is damaged.
    try:
        told: dict[str, Any] = json.loads(path.read_bytes())
        vocabulary = told["model"]["vocab"]
        # Of a Unigram model it is a list of tokens with their scores.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        tokens = {int(number): str(token) for token, number in pairs}
        return tokens | {int(added["id"]): str(added["content"]) for added in told.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
