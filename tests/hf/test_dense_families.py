"""With its feed-forwards left dense, our model computes what Llama, Mistral, Qwen2 and Qwen3 compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf import tiny
from tests.hf.tiny import config_of
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from moesaic import MoesaicForCausalLM

SIZES: dict[str, Any] = {
    **tiny.SIZES,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}, {"qk_norm": False}),
    "llama with biases": (LlamaConfig, {"attention_bias": True}, {"qk_norm": False, "attention_bias": True}),
    "mistral": (
        MistralConfig,
        {"sliding_window": 5},
        {"qk_norm": False, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen2": (Qwen2Config, {}, {"qk_norm": False, "attention_bias": True, "attention_output_bias": False}),
    "qwen3": (Qwen3Config, {}, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_of_a_dense_family(name: str, tmp_path: Path) -> None:
    kind, theirs, ours = FAMILIES[name]
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(kind(**SIZES, **theirs)).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim == 1:  # biases and norms, which begin as zeros and ones
                parameter.normal_(mean=1.0)
    same = {**SIZES, "rms_norm_eps": dense.config.rms_norm_eps}
    model = MoesaicForCausalLM(config_of(mlp_only_layers=[0, 1], **{**same, **ours})).eval()
    model.load_state_dict(dense.state_dict())  # the very same parameters, by the same names
    ids = torch.randint(50, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**prompt), dense.generate(**prompt))
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
