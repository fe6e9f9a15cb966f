"""Validation: loss and perplexity of a causal language model, domain by domain."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data import TokenData, load_tokenizer, prepare, validation_windows
from moesaic.data.documents import Skipped
from moesaic.data.sources import STDLIB
from moesaic.data.tokenizer import tokenizer_fingerprint
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hf.causality import later_slots_seen, later_tokens_seen
from moesaic.hf.load import load_model, model_folder
from moesaic.layer import moe_layers
from moesaic.train.loss import token_losses
from moesaic.train.precision import autocast
from moesaic.train.recipe import DataSettings, TextSettings
from moesaic.train.world import World

LONGEST = 1024
"""Tokens per window where nothing else is known of a model."""


@dataclass(frozen=True)
class DomainResult:
    """What a model makes of one domain.

    Attributes:
        loss: mean cross entropy in nats per token.
        perplexity: ``exp(loss)``.
        tokens: how many were predicted.
        bits_per_byte: the loss per byte of text, which models with different tokenizers share; None where the number of
            bytes is not known. Taken from the domain's mean number of bytes per token.
    """

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """A model, what it was measured on, and the result per domain.

    Attributes:
        skipped: what of the text could not be read.
        text_changed: a run's own text is no longer what it was trained on, so that what it held out may not be what is
            held out now.
        not_causal: which router or capacity looks at later tokens, so that the perplexity is not that of a model that
            writes text; "" where none does.
    """

    model: str
    split: str
    sequence_length: int
    domains: dict[str, DomainResult]
    skipped: list[Skipped]
    text_changed: bool = False
    not_causal: str = ""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Mapping[str, npt.NDArray[Any]],
    *,
    sequence_length: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: str = "fp32",
    bytes_per_token: Mapping[str, float] | None = None,
    world: World | None = None,
) -> dict[str, DomainResult]:
    """Loss per domain over windows of ``sequence_length`` predicted tokens, without padding; deterministic.

    The model is left in the mode (training or not) in which it came. What fills no window at a domain's end does not
    count.

    Args:
        model: any transformers causal language model.
        tokens: domain to token ids ``[n]``.
        max_tokens: predict about so many per domain, in windows spread over it; None for all.
        precision: ``"fp32"`` (as the weights are) or ``"bf16"`` (autocast); the loss is float32 in both.
        bytes_per_token: of each domain, for ``bits_per_byte``.
        world: the ranks that the model is parallelized over: each takes its share of every batch, and all get the
            same result.

    Raises:
        DataError: where a domain is shorter than one window.
        ConfigError: for an unknown precision, a size out of range, or windows longer than the model has positions.
    """
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    positions = model_positions(model)
    if positions is not None and sequence_length > positions:
        raise ConfigError(
            f"sequence_length is {sequence_length}: it must be at most {positions}, the tokens that the model has "
            "positions for"
        )
    limit = max(1, max_tokens // sequence_length) if max_tokens and sequence_length > 0 else None
    windows = validation_windows(tokens, sequence_length, limit, batch_size=batch_size)
    device = next(model.parameters()).device
    world = world or World()
    sums: dict[str, float] = dict.fromkeys(tokens, 0.0)
    counts: dict[str, int] = dict.fromkeys(tokens, 0)
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            for domain, ids in windows:
                mine = world.share(len(ids))
                # All ranks run the model together: who has no sequence left runs one that does not count.
                ids_on_device = ids[mine if mine.start < mine.stop else slice(1)].to(device)
                logits = model(input_ids=ids_on_device[:, :-1], use_cache=False).logits
                losses = token_losses(logits, ids_on_device[:, 1:])[: mine.stop - mine.start]
                sums[domain] += float(losses.double().sum())
                counts[domain] += losses.numel()
    finally:
        model.train(was_training)
    totals = world.sums([*sums.values(), *counts.values()])
    found = zip(tokens, totals, totals[len(sums) :], strict=False)
    return {name: _result(total, int(count), (bytes_per_token or {}).get(name)) for name, total, count in found}


def _result(total: float, count: int, bytes_per_token: float | None) -> DomainResult:
    loss = total / count
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows from 710 on
    return DomainResult(loss, perplexity, count, loss / math.log(2) / bytes_per_token if bytes_per_token else None)


def bytes_per_token(data: TokenData, sides: Sequence[str] = ("validation",)) -> dict[str, float]:
    """Mean number of UTF-8 bytes that one token stands for, by domain."""
    means = {}
    for domain in {name for side in sides for name in data.counts[side]}:
        counts = [data.counts[side][domain] for side in sides if domain in data.counts[side]]
        means[domain] = sum(count.bytes for count in counts) / sum(count.tokens for count in counts)
    return means


def evaluate_folder(
    path: str | Path,
    *,
    sources: Sequence[str] | None = None,
    split: str | None = None,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    model: PreTrainedModel | None = None,
) -> Evaluation:
    """Measure a model on disk: ours, or any causal language model of transformers.

    Args:
        path: a model folder, or the folder of a training run.
        sources: as :func:`moesaic.data.prepare` takes them; by default what the run was trained on, else ``stdlib``.
        split: ``"validation"`` (what training holds out) or ``"all"``; by default the former, but all of sources that
            were given and are not ``stdlib``.
        sequence_length: by default the run's own, else 1024 or what the model or the shortest domain allows.
        model: measured in the place of the folder's own, which is then not loaded, on the same text with its tokenizer.

    Raises:
        CheckpointError: where there is no usable model.
        DataError: where there is no usable text, or too little of it.
        ConfigError: for an option out of range.
    """
    if split not in (None, "validation", "all"):
        raise ConfigError(f"split is {split!r}: it must be one of validation, all")
    if model is None:
        model, tokenizer = load_model(path)
    else:
        tokenizer = load_tokenizer(str(model_folder(path)))
    run, fingerprint = _run_of(Path(path))
    chosen = list(sources or (run.sources if run else [STDLIB]))
    split = split or ("all" if sources and chosen != [STDLIB] else "validation")
    fraction = run.validation_fraction if run else 0.05
    trained = run.vocab_size if isinstance(run, DataSettings) and not (run.tokenizer or sources) else None
    data = _prepare(chosen, tokenizer, model_folder(path), trained, fraction)
    sides = ("train", "validation") if split == "all" else ("validation",)
    tokens = {
        name: np.concatenate([getattr(data, side)[name] for side in sides if name in getattr(data, side)])
        for name in sorted({name for side in sides for name in getattr(data, side)})
    }
    if sequence_length is None:
        longest = run.sequence_length if run else min(LONGEST, model_positions(model) or LONGEST)
        shortest = min((len(ids) for ids in tokens.values()), default=0)
        sequence_length = max(1, min(longest, shortest - 1))
    results = evaluate(
        model,
        tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        precision=precision,
        bytes_per_token=bytes_per_token(data, sides),
    )
    changed = sources is None and fingerprint not in (None, data.fingerprint)
    layers = moe_layers(model)
    not_causal = later_tokens_seen(layers) or later_slots_seen(layers)
    return Evaluation(str(path), split, sequence_length, results, data.skipped, changed, not_causal)


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
    sources: list[str], tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int | None, fraction: float
) -> TokenData:
    """Tokens made by the model's own tokenizer.

    ``vocab_size`` says that the run trained it on these sources: its tokens are then in the cache, under that setting.
    """
    if vocab_size is not None:
        data = prepare(sources, vocab_size=vocab_size, validation_fraction=fraction)
        if tokenizer_fingerprint(data.tokenizer) == tokenizer_fingerprint(tokenizer):
            return data
    return prepare(sources, tokenizer=str(folder), validation_fraction=fraction)


def model_positions(model: Any) -> int | None:
    """The longest sequence that a model, or a configuration's, has positions for; None where that does not say."""
    config: Any = getattr(model, "config", model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    return next((value for value in told if isinstance(value, int) and value > 0), None)
