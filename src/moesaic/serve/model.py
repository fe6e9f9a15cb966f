"""What the engine has to know of a model: its attention layers, its context, and why it cannot be run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts.native import attention as native_attention
from moesaic.hf import use_native_linears
from moesaic.hf.causality import refuse_generation
from moesaic.serve.attention import NAME, How, attention_by
from moesaic.serve.isolation import isolated, needs_no_functions, refusal

_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
# Attributes of configurations that mean state of another kind than keys and values of each layer's own.
_OTHER_STATE = {
    "num_kv_shared_layers": "layers share keys and values",
    "index_topk": "it chooses the keys that a token sees (sparse attention)",
    "attention_chunk_size": "attention is within chunks",
}
# Rotary embeddings whose frequencies follow from the longest sequence of a batch once it is beyond this length.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


@dataclass
class _Recorder:
    """Notes which modules ask for attention, in the place of attention."""

    layers: dict[nn.Module, KVShape] = field(default_factory=dict)

    def attend(self, module: nn.Module, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, how: How) -> Tensor:
        if module in self.layers:
            raise UnsupportedError(f"the engine cannot run {type(module).__name__}: it attends twice in one pass")
        self.layers[module] = KVShape(
            key_THd.shape[1], key_THd.shape[2], value_THd.shape[2], key_THd.dtype, key_THd.device, how.window
        )
        return value_THd.new_zeros(*query_THd.shape[:2], value_THd.shape[2])


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps of a token: ``heads`` keys of width ``dk`` and values of width ``dv``."""

    heads: int
    dk: int
    dv: int
    dtype: torch.dtype
    device: torch.device
    window: int

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.dk + self.dv) * self.dtype.itemsize


def prepare(model: PreTrainedModel, context: int) -> dict[nn.Module, KVShape]:
    """Set a model's attention to ``"moesaic"``, and find its attention layers by a pass over one token.

    On a CPU its linear layers run on the native kernels from here on.

    Args:
        context: tokens that a request may have.

    Raises:
        UnsupportedError: where its layers keep something else than keys and values through transformers' attention
            interface; the message says what.
    """
    refuse_unsupported(model)
    use_native_linears(model)
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        raise _unsupported(model, "its attention does not go through transformers' attention interface")
    layers = _attention_layers(model)
    if len(layers) != config.num_hidden_layers:
        raise _unsupported(model, f"{len(layers)} of its {config.num_hidden_layers} layers use attention as we know it")
    if len(devices := {str(shape.device) for shape in layers.values()}) > 1:
        raise _unsupported(model, f"its layers are on several devices ({', '.join(sorted(devices))})")
    window = getattr(config, "sliding_window", None) or context
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    for (module, shape), kind in zip(layers.items(), kinds, strict=True):
        # Some models put the window into the mask only, which we do not make.
        if kind == "sliding_attention" and not shape.window and window < context:
            raise _unsupported(model, f"{type(module).__name__} does not tell its attention of the sliding window")
    return layers


def isolation(
    model: PreTrainedModel, layers: Mapping[nn.Module, KVShape], page_size: int, wanted: bool | None
) -> Callable[[], AbstractContextManager[None]]:
    """What to enter for each forward pass, so that a request's numbers do not depend on its batch: maybe nothing.

    Args:
        wanted: None: where the model computes in float32, and it can be done.

    Raises:
        UnsupportedError: where it is wanted and cannot be done.
    """
    if wanted is False or (wanted is None and model.dtype != torch.float32):
        return nullcontext
    reason = refusal(model)
    if reason is None:
        shape = next(iter(layers.values()))
        pool = torch.empty(0, shape.heads, shape.dk, page_size, dtype=shape.dtype, device=shape.device)
        reason = native_attention.refusal(pool, pool, pool)
    try:
        if reason is not None:
            raise UnsupportedError(f"requests cannot be isolated from one another: {reason}")
        with isolated():
            _attention_layers(model)
        light = needs_no_functions(lambda: _attention_layers(model))
    except UnsupportedError:
        if wanted:
            raise
        return nullcontext
    return partial(isolated, functions=not light)


def _attention_layers(model: PreTrainedModel) -> dict[nn.Module, KVShape]:
    recorder = _Recorder()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode(), attention_by(recorder):
        model(input_ids=token, position_ids=token, use_cache=False)
    return recorder.layers


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse what the configuration and the modules already show to be of another kind.

    Raises:
        UnsupportedError: with the reason.
    """
    refuse_generation(model)
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise _unsupported(model, "it is an encoder with a decoder")
    if getattr(model, "_is_stateful", False):
        raise _unsupported(model, "it keeps a recurrent state, not only keys and values")
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        raise _unsupported(model, f"it has layers of type {', '.join(map(repr, other))}")
    for name, reason in _OTHER_STATE.items():
        if getattr(config, name, None):
            raise _unsupported(model, f"{reason} ({name})")
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise _unsupported(model, "it has convolutions over the tokens")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _unsupported(model, "it takes no position_ids")


def context_limit(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens that a request may have, prompt and output together.

    Raises:
        ConfigError: where more are wanted than the model has positions for, or it does not say how many it has.
        UnsupportedError: where the model's positions would depend on the other requests' lengths.
    """
    config = model.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None)
    if wanted is not None and wanted < 2:
        raise ConfigError(f"max_context is {wanted}: a request has a token of prompt and one of output at least")
    if own is None and wanted is None:
        raise ConfigError("max_context is needed: the model's configuration has no max_position_embeddings")
    if own is not None and wanted is not None and wanted > own:
        raise ConfigError(f"max_context is {wanted}: the model has {own} positions")
    limit = min(length for length in (own, wanted) if length is not None)
    fixed = _fixed_length(config)
    if fixed is not None and limit > fixed:
        raise UnsupportedError(
            f"beyond {fixed} tokens the model's rotary embedding depends on the longest sequence of a batch: "
            f"max_context is {limit}, it may be at most {fixed}"
        )
    return limit


def _fixed_length(config: Any) -> int | None:
    """The length up to which positions mean the same in every batch; None: always."""
    rope = getattr(config, "rope_parameters", None) or {}
    # One dictionary, or one for each type of layer.
    several = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    lengths = [
        part.get("original_max_position_embeddings") or config.max_position_embeddings
        for part in several
        if part.get("rope_type") in _LENGTH_DEPENDENT
    ]
    return min(lengths, default=None)


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedError:
    return UnsupportedError(f"the engine cannot run {type(model).__name__}: {reason}")
