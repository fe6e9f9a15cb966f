"""A dense model on disk as transformers' own model, from safetensors or a ``.gguf`` file."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moesaic.convert.banks import sound
from moesaic.convert.dense import DenseModel


def load_dense(model: DenseModel, dtype: torch.dtype) -> Any:
    """The model in evaluation mode, with weights of ``dtype``, none of which asks for a gradient.

    Raises:
        CheckpointError: where a weight is not finite, or the model cannot be read.
    """
    config = copy.deepcopy(model.source.config)
    with torch.device("meta"):
        dense: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    names = [name for layer in range(model.num_layers) for name in (*model.ffn(layer), *model.others(layer))]
    state = {name: sound(model.source, name).to(dtype) for name in (*names, *model.outside())}
    dense.load_state_dict(state, assign=True, strict=False)
    dense.tie_weights()
    dense.model.rotary_emb = type(dense.model.rotary_emb)(config=config)  # its frequencies are computed, not stored
    return dense.eval().requires_grad_(False)
