"""A model as it is, tensor by tensor, as a folder of safetensors: what a ``.gguf`` file becomes for every command."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moesaic.convert.dense import check_dense
from moesaic.convert.source import EMBEDDING, TensorSource, open_source
from moesaic.convert.writing import Output, Written, check_output, write_model


def unpack(
    model: str | Path, out: str | Path, *, say: Callable[[str], None] | None = None, shard_bytes: int = 2 << 30
) -> Written:
    """Write a dense model as a folder of safetensors that transformers loads, with its tokenizer; nothing changes.

    What a ``.gguf`` file holds quantized comes out in float32, so that one need not be read by its slow way again.

    Args:
        model: a folder, or a ``.gguf`` file, of an architecture in :data:`moesaic.convert.dense.FAMILIES`.
        out: must not exist yet.
        say, shard_bytes: as in :func:`moesaic.convert.write_model`.

    Raises:
        CheckpointError, UnsupportedError: where ``model`` cannot be read, or is not such a model.
        CheckpointError: where ``out`` exists, or holds another unfinished conversion.
        UsageError: where ``out`` cannot be written.
    """
    out, source = Path(out), open_source(model)
    settings = {"method": "dense", "model": source.content()}
    check_output(out, settings)
    check_dense(source)
    outputs = [
        Output(name, source.shape(name), source.dtype(name), partial(source.read, name)) for name in source.names
    ]
    return write_model(
        outputs,
        out,
        config=_whole(source),
        tokenizer_from=source.tokenizer_from,
        settings=settings,
        shard_bytes=shard_bytes,
        say=say,
    )


def _whole(source: TensorSource) -> PretrainedConfig:
    """The configuration with what a GGUF file does not say and other programs ask for."""
    config = copy.deepcopy(source.config)
    config.architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = config.dtype or source.dtype(EMBEDDING)
    return config
