"""A model folder on disk, measured on text by domain, and against the model that it was made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data import TokenData, prepare
from moesaic.data.documents import Skipped
from moesaic.data.sources import STDLIB
from moesaic.data.tokenizer import tokenizer_fingerprint
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hf.causality import later_slots_seen, later_tokens_seen
from moesaic.layer import moe_layers
from moesaic.train.agreement import Agreement, evaluate_against
from moesaic.train.evaluate import DomainResult, bytes_per_token, evaluate, model_positions
from moesaic.train.on_disk import ModelOnDisk, on_disk
from moesaic.train.recipe import DataSettings, TextSettings

LONGEST = 1024
"""Tokens per window where nothing else is known of a model."""


@dataclass(frozen=True)
class Evaluation:
    """A model, what it was measured on, and the result per domain.

    Attributes:
        skipped: what of the text could not be read.
        text_changed: a run's own text is no longer what it was trained on, so that what it held out may not be what is
            held out now.
        not_causal: which router or capacity looks at later tokens, so that the perplexity is not that of a model that
            writes text; "" where none does.
        against: the parent that the model was compared with, and ``agreement`` what it keeps of it, by domain; None and
            empty where it was not.
    """

    model: str
    split: str
    sequence_length: int
    domains: dict[str, DomainResult]
    skipped: list[Skipped]
    text_changed: bool = False
    not_causal: str = ""
    against: str | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)


def evaluate_folder(
    path: str | Path | ModelOnDisk,
    *,
    sources: Sequence[str] | None = None,
    split: str | None = None,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    model: PreTrainedModel | None = None,
    against: str | Path | ModelOnDisk | None = None,
) -> Evaluation:
    """Measure a model on disk: ours, or any causal language model of transformers.

    Args:
        path: a model folder, the folder of a training run, or a model that lies elsewhere
            (:func:`moesaic.convert.gguf_model`).
        sources: as :func:`moesaic.data.prepare` takes them; by default what the run was trained on, else ``stdlib``.
        split: ``"validation"`` (what training holds out) or ``"all"``; by default the former, but all of sources that
            were given and are not ``stdlib``.
        sequence_length: by default the run's own, else 1024 or what the model or the shortest domain allows.
        model: measured in the place of the folder's own, which is then not loaded, on the same text with its tokenizer.
        against: the model that this one was made from (or any other with its tokenizer), to be measured beside it;
            given as ``path`` is.

    Raises:
        CheckpointError: where there is no usable model.
        DataError: where there is no usable text, or too little of it.
        ConfigError: for an option out of range, and where the tokenizers or vocabularies of both models differ.
    """
    if split not in (None, "validation", "all"):
        raise ConfigError(f"split is {split!r}: it must be one of validation, all")
    own = on_disk(path)
    other = None if against is None else on_disk(against)
    if other is not None:
        _check_parent(own, other)
    model = model if model is not None else own.load()
    parent = None if other is None else other.load().to(next(model.parameters()).device)  # type: ignore[arg-type]
    run, fingerprint = _run_of(Path(own.path))
    chosen = list(sources or (run.sources if run else [STDLIB]))
    split = split or ("all" if sources and chosen != [STDLIB] else "validation")
    fraction = run.validation_fraction if run else 0.05
    trained = run.vocab_size if isinstance(run, DataSettings) and not (run.tokenizer or sources) else None
    data = _prepare(chosen, own.tokenizer, trained, fraction)
    sides = ("train", "validation") if split == "all" else ("validation",)
    tokens = {
        name: np.concatenate([getattr(data, side)[name] for side in sides if name in getattr(data, side)])
        for name in sorted({name for side in sides for name in getattr(data, side)})
    }
    if sequence_length is None:
        positions = [told for each in (model, parent) if each is not None and (told := model_positions(each))]
        longest = run.sequence_length if run else min([LONGEST, *positions])
        shortest = min((len(ids) for ids in tokens.values()), default=0)
        sequence_length = max(1, min(longest, shortest - 1))
    options: dict[str, Any] = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "precision": precision,
        "bytes_per_token": bytes_per_token(data, sides),
    }
    agreement: dict[str, Agreement] = {}
    if parent is None:
        results = evaluate(model, tokens, **options)
    else:
        results, agreement = evaluate_against(model, parent, tokens, **options)
    changed = sources is None and fingerprint not in (None, data.fingerprint)
    layers = moe_layers(model)
    not_causal = later_tokens_seen(layers) or later_slots_seen(layers)
    return Evaluation(
        own.path,
        split,
        sequence_length,
        results,
        data.skipped,
        changed,
        not_causal,
        None if other is None else other.path,
        agreement,
    )


def _check_parent(own: ModelOnDisk, parent: ModelOnDisk) -> None:
    """Refuse a parent whose tokens are not those of the model: its predictions could not be compared."""
    if own.vocab_size != parent.vocab_size:
        raise ConfigError(
            f"{own.path!r} has a vocabulary of {own.vocab_size} and {parent.path!r} one of {parent.vocab_size}: give "
            "the model that the first was made from"
        )
    if len({tokenizer_fingerprint(each.tokenizer) for each in (own, parent)}) > 1:
        raise ConfigError(
            f"the tokenizers in {own.path!r} and {parent.path!r} differ: give the model that the first was made from"
        )


def _run_of(path: Path) -> tuple[TextSettings | None, str | None]:
    """``[data]`` of the run that ``path`` is the folder of, and its data's fingerprint; None where it is no run's."""
    note = path / "run.json"
    if not note.is_file():
        return None, None
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        tables = told["recipe"]["data"]
        # Only a run that made a model from nothing has something to say of a tokenizer.
        kind = DataSettings if "vocab_size" in tables else TextSettings
        return kind.model_validate(tables), told.get("data", {}).get("fingerprint")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(note)!r} cannot be read: {error}") from error


def _prepare(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, fraction: float
) -> TokenData:
    """Tokens made by the model's own tokenizer.

    ``vocab_size`` says that the run trained it on these sources: its tokens are then in the cache, under that setting.
    """
    if vocab_size is not None:
        data = prepare(sources, vocab_size=vocab_size, validation_fraction=fraction)
        if tokenizer_fingerprint(data.tokenizer) == tokenizer_fingerprint(tokenizer):
            return data
    return prepare(sources, tokenizer=tokenizer, validation_fraction=fraction)
