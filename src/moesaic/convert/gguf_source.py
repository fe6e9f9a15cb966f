"""The tensors of a GGUF file, dequantized one at a time, with transformers' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from moesaic.convert.source import TensorSource, sample_places
from moesaic.errors import CheckpointError, MissingDependencyError, UnsupportedError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""GGUF's own names; a Mistral is a ``llama`` there."""
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource(TensorSource):
    """A ``.gguf`` file of a dense model of :data:`ARCHITECTURES`; all values are float32.

    Names and, for ``llama``, the order of the rows of queries and keys (GGUF interleaves the two halves that RoPE
    turns) are undone as transformers' own reader of GGUF does it, which would hold the whole model.

    Raises:
        CheckpointError: where the file is missing or damaged.
        MissingDependencyError: where ``gguf`` is not installed.
        UnsupportedError: for another architecture, a mixture of experts, or rescaled rotary frequencies, which a
            configuration cannot take over from GGUF.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MissingDependencyError(
                "reading a .gguf file needs the package gguf: pip install 'moesaic[gguf]'"
            ) from error
        self.path = self.tokenizer_from = path
        if not path.is_file():
            raise CheckpointError(
                f"there is no file at {str(path)!r}: give a folder with a config.json or a .gguf file"
            )
        try:
            reader = GGUFReader(path)
            self._architecture = str(reader.fields["general.architecture"].contents())
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{str(path)!r} is no sound GGUF file: {error}") from error
        self._check(reader)
        self.config = _config(path)
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            if (name := transformers_name(tensor.name)) is not None:
                self._tensors[name] = tensor
        self.names = tuple(self._tensors)

    def _check(self, reader: Any) -> None:
        where = f"the GGUF file {str(self.path)!r}"
        if self._architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{where} holds a {self._architecture!r}: supported are {', '.join(ARCHITECTURES)} (Mistral is a llama)"
            )
        stored = {tensor.name for tensor in reader.tensors}
        if any("_exps." in name or "ffn_gate_inp" in name for name in stored):
            raise UnsupportedError(f"{where} is a mixture of experts: give its safetensors folder to --method prune")
        if any(name.startswith("rope_factors") or name == "rope_freqs.weight" for name in stored):
            raise UnsupportedError(f"{where} has rescaled rotary frequencies: give the model's safetensors folder")
        if (scaling := self._rope_scaling(reader)) != "none":
            raise UnsupportedError(
                f"{where} has rescaled rotary frequencies (rope.scaling.type {scaling}): give the model's safetensors "
                "folder"
            )
        nameless = [name for name in sorted(stored) if transformers_name(name) is None]
        if nameless:
            raise UnsupportedError(f"{where} holds {nameless[0]}, which no {self._architecture} that is supported has")

    def _rope_scaling(self, reader: Any) -> str:
        """What llama.cpp would take it for: a factor without a type is linear scaling."""

        def told(name: str) -> Any:
            field = reader.fields.get(f"{self._architecture}.{name}")
            return None if field is None else field.contents()

        kind = told("rope.scaling.type")
        if kind is not None:
            return str(kind)
        factors = [told(name) for name in ("rope.scaling.factor", "rope.scale_linear")]
        return "linear" if any(factor not in (None, 0, 1) for factor in factors) else "none"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> torch.dtype:
        self._tensor(name)
        return torch.float32

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{str(self.path)!r} holds no tensor {name}")
        return self._tensors[name]

    def _read(self, name: str, rows: slice | None) -> Tensor:
        from gguf import dequantize

        stored = self._tensors[name]
        heads = self._interleaved_heads(name)
        data = stored.data if rows is None or heads else stored.data[rows]
        values = np.asarray(dequantize(data, stored.tensor_type), dtype=np.float32)
        tensor = torch.from_numpy(values.copy() if values.base is not None or not values.flags.writeable else values)
        if heads:
            # [heads, half, 2, ...] to [heads, 2, half, ...]
            by_pair = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
            tensor = by_pair.transpose(1, 2).reshape(tensor.shape)
            tensor = tensor if rows is None else tensor[rows].clone()
        return tensor

    def _sample(self, name: str) -> bytes:
        stored = self._tensor(name).data.reshape(-1).view(np.uint8)
        return b"".join(stored[place].tobytes() for place in sample_places(stored.size))

    def _interleaved_heads(self, name: str) -> int:
        if self._architecture != "llama":
            return 0
        if ".q_proj." in name:
            return int(self.config.num_attention_heads)
        return int(self.config.num_key_value_heads) if ".k_proj." in name else 0


def transformers_name(name: str) -> str | None:
    """transformers' name of a tensor that GGUF calls ``name``; None where it has none."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and found[2] in _INSIDE:
        return f"model.layers.{found[1]}.{_INSIDE[found[2]]}.{kind}"
    return None


def _config(path: Path) -> Any:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path.absolute().parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the configuration in {str(path)!r} cannot be read: {said}") from error
    finally:
        logging.set_verbosity(before)
    config.__dict__.pop("quantization_config", None)  # what is read here is not quantized any more
    return config
