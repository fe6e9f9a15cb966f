"""From a folder to a model that is ready to be served."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch

from moesaic.serve.engine import Engine
from moesaic.serve.opening import open_model
from moesaic.serve.request import EngineSettings
from moesaic.serve.server.service import Loaded
from moesaic.serve.text import token_bytes
from moesaic.serve.vocabulary import Vocabulary


def load(
    folder: Path,
    settings: EngineSettings,
    *,
    dtype: torch.dtype | None = None,
    adapters: Mapping[str, Path] | None = None,
    with_pool: bool = False,
) -> Loaded:
    """Load a model with its adapters and put an engine around it.

    Args:
        dtype: of the parameters; None: as saved.
        with_pool: whether adapters may come later where there are none now.

    Raises:
        MoesaicError: where the model, an adapter or the settings cannot be used.
    """
    opened = open_model(folder, adapters, dtype=dtype, with_pool=with_pool)
    model, tokenizer, pool = opened.model, opened.tokenizer, opened.pool
    engine = Engine(model, tokenizer, settings, pool)
    # The engine's thread and the server's have a tokenizer each: one cannot bear two threads.
    own = copy.deepcopy(tokenizer)
    return Loaded(
        engine,
        own,
        # The engine's: what is compiled for a text that must match is remembered by tokenizer.
        Vocabulary.of(model, tokenizer),
        token_bytes(own),
        engine.max_context,
        settings.page_size,
        pool,
        dict(adapters or {}),
    )
