"""Whole models of transformers, tiny: the same logits, gradients and tokens with ``"moesaic"`` as with ``"eager"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.experts_classes import decorated
from tests.reference import relative_error
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moesaic.hf

# What a configuration has of these is made small.
SMALL = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 0,
    "sliding_window": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "block_size": 16,
    "use_mamba_kernels": False,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
HEADS = {"head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": HEADS,
    "qwen2_moe": HEADS,
    "qwen3_moe": HEADS,
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "gpt_oss": HEADS,
    "granitemoe": {},
    "phimoe": HEADS,
    "nemotron_h": HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "ernie4_5_moe": HEADS,
    "minimax": HEADS,
    "minimax_m2": HEADS,
    "glm4_moe": HEADS,
    "hunyuan_v1_moe": HEADS,
    "aria_text": HEADS,
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], **HEADS},
}


def config_of(kind: str) -> Any:
    default = AutoConfig.for_model(kind)
    known = {**default.to_dict(), **default.attribute_map}
    small = {name: value for name, value in SMALL.items() if name in known}
    return AutoConfig.for_model(kind, **{**small, **MODELS[kind]})


def tokens() -> Tensor:
    return torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(model: PreTrainedModel, implementation: str) -> dict[str, Tensor]:
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    model.zero_grad()
    output = model(tokens(), labels=tokens())
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


# A model may have entered the interface in a later version than the installed one.
INSTALLED = {module.split(".")[2] for module, _ in decorated()}


@pytest.fixture(params=[kind for kind in MODELS if kind.removesuffix("_text") in INSTALLED])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of each kind in eval mode (some routers add noise while training)."""
    torch.manual_seed(0)
    config = config_of(request.param)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").eval()
    assert any(moesaic.hf.is_experts_module(module) for module in built.modules())
    for module in built.modules():
        if moesaic.hf.is_experts_module(module):
            for parameter in module.parameters():  # so wide that nothing of it is lost in the rest of the model
                torch.nn.init.normal_(parameter, std=0.2)
    return built


def test_same_as_eager(model: PreTrainedModel, tmp_path: Path) -> None:
    assert model.config._experts_implementation == "moesaic"
    wanted, got = logits_and_gradients(model, "eager"), logits_and_gradients(model, "moesaic")
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(got[name], wanted[name]) < 1e-5, name

    generation = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    generated = model.generate(tokens(), **generation)
    model.set_experts_implementation("eager")
    assert torch.equal(generated, model.generate(tokens(), **generation))

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic").eval()
    assert loaded.config._experts_implementation == "moesaic"
    with torch.no_grad():
        assert relative_error(loaded(tokens()).logits, wanted["logits"]) < 1e-5


def test_compiled() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("qwen3_moe"), experts_implementation="moesaic").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(tokens()).logits, model(tokens()).logits) < 1e-5
    torch._dynamo.reset()
