"""The dense models that can become a mixture of experts: what they must have, and what is taken over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moesaic.convert.source import EMBEDDING, TensorSource
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.hf.configuration import MoesaicConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' ``model_type`` of the supported architectures."""
ACTIVATION = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
"""``hidden_act`` of a gated feed-forward to our expert activation."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of its weights."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""How configurations of transformers call the number of a mixture's experts."""
# Buffers that old checkpoints hold, and every model computes itself.
_COMPUTED = (".rotary_emb.inv_freq",)
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "head_dim",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


class FFN(NamedTuple):
    """Names of one layer's feed-forward: ``gate`` and ``up`` are ``[F, D]``, ``down`` is ``[D, F]``."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class DenseModel:
    """A dense Llama-like model on disk, checked by :func:`check_dense`.

    ``d_model`` is its width D, ``d_ff`` its hidden width F, ``activation`` the name of our experts' activation that is
    its feed-forward's, ``dtype`` that of its weights.
    """

    source: TensorSource
    d_model: int
    d_ff: int
    num_layers: int
    activation: str
    dtype: torch.dtype

    def ffn(self, layer: int) -> FFN:
        """The names of the layer's feed-forward matrices."""
        return FFN(*(f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")))

    def others(self, layer: int) -> tuple[str, ...]:
        """The layer's other tensors, which keep their names: attention and norms."""
        return tuple(f"model.layers.{layer}.{name}" for name in _others(self.source.config))

    def outside(self) -> tuple[str, ...]:
        """The tensors of no layer: embedding, last norm, and the head where it is not the embedding."""
        head = () if self.source.config.tie_word_embeddings else ("lm_head.weight",)
        return (EMBEDDING, "model.norm.weight", *head)

    def dense_parameters(self) -> int:
        """Parameters of one layer's feed-forward."""
        return 3 * self.d_model * self.d_ff

    def moe_config(self, **ours: Any) -> MoesaicConfig:
        """Attention, RoPE and vocabulary of this model, with settings of :class:`moesaic.MoesaicConfig` for the rest.

        Raises:
            ConfigError: for settings that do not go together.
        """
        theirs = self.source.config
        kept = {name: getattr(theirs, name) for name in _KEPT if getattr(theirs, name, None) is not None}
        window = _sliding_window(theirs)
        qkv, output = _biases(theirs)
        settings: dict[str, Any] = {
            "qk_norm": theirs.model_type == "qwen3",
            "attention_bias": qkv,
            "attention_output_bias": None if output == qkv else output,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "expert_activation": self.activation,
            "architectures": ["MoesaicForCausalLM"],
            "dtype": self.dtype,
        }
        return MoesaicConfig(**{**kept, **settings, **ours})


def check_dense(source: TensorSource) -> DenseModel:
    """See that ``source`` is a dense model of :data:`FAMILIES` with all its tensors; reads no values.

    Raises:
        UnsupportedError: for a mixture of experts, another architecture, or a setting of it that our model lacks; the
            message says what is supported. Also for a stored tensor that the configuration does not tell of, such as a
            bias: it would be lost.
        CheckpointError: where a tensor is missing or has another shape than the configuration says.
    """
    config, where = source.config, repr(str(source.path))
    family = config.model_type
    if is_moe(source):
        raise UnsupportedError(
            f"{where} is a mixture of experts already ({family}): prune takes it, this takes a dense one"
        )
    if family not in FAMILIES:
        raise UnsupportedError(f"{where} is a {family!r}: supported are the dense models {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{where} has quantized weights: give the model in floating point")
    if config.hidden_act not in ACTIVATION:
        raise UnsupportedError(f"{where} has hidden_act {config.hidden_act!r}: supported are {', '.join(ACTIVATION)}")
    if getattr(config, "mlp_bias", False):
        raise UnsupportedError(f"{where} has biases in its feed-forward (mlp_bias): supported is one without")
    _sliding_window(config)
    model = DenseModel(
        source=source,
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        activation=ACTIVATION[config.hidden_act],
        dtype=torch.float32,
    )
    _check_tensors(model)
    return DenseModel(**{**model.__dict__, "dtype": source.dtype(model.ffn(0).gate)})


def is_moe(source: TensorSource) -> bool:
    """Whether the model has experts, by its configuration."""
    return any(isinstance(count := getattr(source.config, name, None), int) and count > 0 for name in EXPERT_COUNTS)


def _check_tensors(model: DenseModel) -> None:
    source = model.source
    wanted = _outside(model)
    for layer in range(model.num_layers):
        gate, up, down = model.ffn(layer)
        wanted |= {
            gate: (model.d_ff, model.d_model),
            up: (model.d_ff, model.d_model),
            down: (model.d_model, model.d_ff),
        }
        wanted |= {f"model.layers.{layer}.{name}": shape for name, shape in _others(source.config).items()}
    for name, shape in wanted.items():
        if name not in source:
            raise CheckpointError(f"{str(source.path)!r} is incomplete: it holds no {name}")
        if source.dtype(name) not in DTYPES:
            raise UnsupportedError(
                f"{str(source.path)!r} has {name} as {source.dtype(name)}: supported are {', '.join(map(str, DTYPES))}"
            )
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{str(source.path)!r} has {name} of shape {list(source.shape(name))}, configured is {list(shape)}"
            )
    for name in source.names:
        if name not in wanted and name != "lm_head.weight" and not name.endswith(_COMPUTED):
            raise UnsupportedError(
                f"{str(source.path)!r} holds {name}, which its configuration ({source.config.model_type}) does not "
                "tell of: it would be lost"
            )


def _outside(model: DenseModel) -> dict[str, tuple[int, ...]]:
    """The tensors of no layer and their shapes."""
    embedding, norm, *head = model.outside()
    vocabulary = (model.source.config.vocab_size, model.d_model)
    return {embedding: vocabulary, norm: (model.d_model,), **dict.fromkeys(head, vocabulary)}


def _others(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer beside the feed-forward's, and their shapes."""
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    of_keys = (getattr(config, "num_key_value_heads", None) or heads) * size
    rows = {"q": heads * size, "k": of_keys, "v": of_keys, "o": width}
    qkv, output = _biases(config)
    biased = ("qkv" if qkv else "") + ("o" if output else "")
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{part}_proj.weight": (count, heads * size if part == "o" else width) for part, count in rows.items()
    }
    shapes |= {f"self_attn.{part}_proj.bias": (rows[part],) for part in biased}
    if config.model_type == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    return {**shapes, "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}


def _biases(config: Any) -> tuple[bool, bool]:
    """Whether the projections of queries, keys and values have a bias, and whether that of the output has."""
    if config.model_type == "qwen2":
        return True, False
    has = bool(getattr(config, "attention_bias", False))
    return has, has


def _sliding_window(config: Any) -> int | None:
    """How many tokens attention looks back in every layer; None for all of them."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is None or kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise UnsupportedError(
            "attention looks back over a sliding window in some layers only (layer_types): "
            "supported is one in all layers, or in none"
        )
    return int(window)
