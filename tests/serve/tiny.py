"""Tiny models of many families, with random weights, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from moesaic.hf import MoesaicConfig

VOCABULARY = 288  # 256 bytes and some ids more

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "olmoe": lambda: OlmoeConfig(**_SIZES, num_experts=8, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, sliding_window=20),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=12
    ),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=16, sliding_window=12, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES | {"num_hidden_layers": 6}, head_dim=16, sliding_window=12, layer_types=None
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
    ),
    "moesaic": lambda: MoesaicConfig(**_SIZES, **_EXPERTS, head_dim=16),
}


def tiny(family: str, seed: int = 0, **options: object) -> PreTrainedModel:
    """A model whose logits are far from each other, in float32 on the CPU; options go to ``from_config``."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family](), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual small weights would make all tokens nearly equally probable.
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and ``<end>`` (256) as its end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
