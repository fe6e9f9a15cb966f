"""The engine says what ``generate`` says of models with other kinds of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.hf.family import FAMILY
from tests.serve.driving import GREEDY, PROMPTS, TOKENIZER, assert_all_returned, continued, run
from tests.serve.tiny import VOCABULARY

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.serve.engine import Engine
from moesaic.serve.request import EngineSettings, Request


def make(variant: str) -> MoesaicForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    limits = {"head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2}
    return MoesaicForCausalLM(MoesaicConfig(**{**sizes, **experts, **ends, **limits, **FAMILY[variant]})).eval()


SHORT = replace(GREEDY, max_tokens=8)


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("variant", FAMILY)
def test_requests_in_one_batch(variant: str, isolate: bool) -> None:
    model = make(variant)
    wanted = [continued(model, prompt, SHORT.max_tokens) for prompt in PROMPTS[1:4]]
    engine = Engine(model, TOKENIZER, EngineSettings(kv_bytes=200 * 4096, isolate=isolate))
    outputs = run(engine, *(Request(str(i), prompt, SHORT) for i, prompt in enumerate(PROMPTS[1:4])))
    assert [outputs[str(i), 0].token_ids for i in range(3)] == wanted
    assert_all_returned(engine)
