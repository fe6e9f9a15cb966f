"""From folders to a model and its adapters in memory, ready for an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.adapters.pool import AdapterPool
from moesaic.hf import freeze
from moesaic.hf.load import load_model
from moesaic.hf.quantized import expert_modules


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, its tokenizer, and the pool of its adapters; None without any."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: AdapterPool | None


def open_model(
    folder: str | Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    dtype: torch.dtype | None = None,
    with_pool: bool = False,
) -> Opened:
    """Load a model and its adapters for inference.

    Args:
        adapters: by name, their folders.
        dtype: of the parameters; None: as saved.
        with_pool: whether adapters may come later where there are none now.

    Raises:
        MoesaicError: where the model or an adapter cannot be used.
    """
    model, tokenizer = load_model(folder, dtype=dtype)
    if expert_modules(model):
        freeze(model)  # before the pool, which moves the weights
    pool = AdapterPool(model) if adapters or with_pool else None
    for name, path in (adapters or {}).items():
        assert pool is not None
        pool.load(name, path)
    return Opened(model, tokenizer, pool)
