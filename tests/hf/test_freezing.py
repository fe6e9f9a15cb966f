"""moesaic.freeze: the same numbers, shapes and files from weights that lie otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.test_experts import D, E, config_of, experts_class
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel, Qwen3MoeConfig

import moesaic
from moesaic import ExpertBank, MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.experts.native import library, memory
from moesaic.hf.experts import experts_forward, weights_of

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def transposed_experts(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Experts of transformers' interface that are stored as ``[E, in, out]``."""
    torch.manual_seed(0)
    experts = experts_class(is_transposed=True)(config_of()).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts


def call_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(9, D).to(dtype), torch.randint(0, E, (9, 2)), torch.rand(9, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transposed_weights_are_reordered_and_stay_the_same(dtype: torch.dtype) -> None:
    experts = transposed_experts(dtype)
    weights = weights_of(experts)
    assert weights.transposed and weights.up.is_contiguous()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in experts.parameters()]
    calls = call_of(dtype)
    wanted = experts_forward(experts, *calls)

    assert moesaic.freeze(experts) is experts
    assert [parameter.data_ptr() for parameter in experts.parameters()] == addresses
    after = experts.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
    assert not any(parameter.requires_grad for parameter in experts.parameters())
    for matrix in (weights_of(experts).up, weights_of(experts).down):
        assert matrix.stride(1) == 1 and matrix.stride(2) == matrix.shape[1]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(experts_forward(experts, *calls), wanted, rtol=tolerance, atol=tolerance)

    moesaic.freeze(experts)  # once more changes nothing
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("backend", moesaic.experts.available())
def test_every_backend_takes_frozen_weights(backend: str) -> None:
    experts = moesaic.freeze(transposed_experts())
    calls = call_of()
    with moesaic.use_backend("loop"):
        wanted = experts_forward(experts, *calls)
    with moesaic.use_backend(backend):
        torch.testing.assert_close(experts_forward(experts, *calls), wanted, rtol=1e-5, atol=1e-5)


def gpt_oss() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    return AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").eval()


def test_a_frozen_model_is_saved_as_it_was(tmp_path: Path) -> None:
    model = gpt_oss()
    model.save_pretrained(tmp_path / "before")
    moesaic.freeze(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_a_checkpoint_may_be_loaded_into_a_frozen_model() -> None:
    other, model = gpt_oss().state_dict(), moesaic.freeze(gpt_oss())
    for tensor in other.values():
        tensor.mul_(2)
    model.load_state_dict(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    assert experts.down_proj.stride(1) == 1


@pytest.mark.parametrize("quantized", [None, "int8", "int4"])
def test_our_own_layer(quantized: str | None) -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(d_model=16, d_ff=24, num_experts=4, top_k=2, bias=True))
    if quantized:
        moesaic.quantize(layer, quantized)
    x = torch.randn(9, 16)
    wanted = layer(x).detach()
    strides = {name: tensor.stride() for name, tensor in layer.state_dict().items()}
    moesaic.freeze(layer)
    assert torch.equal(layer(x), wanted)
    assert {name: tensor.stride() for name, tensor in layer.state_dict().items()} == strides
    assert not any(parameter.requires_grad for parameter in layer.experts.parameters())


def test_what_has_no_experts_is_refused() -> None:
    linear = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Linear has no experts to freeze"):
        moesaic.freeze(linear)
    assert linear.weight.requires_grad


def test_on_the_meta_device_nothing_moves() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4))
    assert moesaic.freeze(model) is model


def test_reordering_holds_one_expert_twice() -> None:
    matrix = torch.randn(7, 33, 20)
    copy, address = matrix.clone(), matrix.data_ptr()
    reordered = memory.inputs_last(matrix)
    assert torch.equal(reordered, copy)
    assert reordered.data_ptr() == address and reordered.stride() == (33 * 20, 1, 33)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked of Linux")
@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5 << 20])
def test_memory_keeps_its_content_on_huge_pages(num_bytes: int) -> None:
    tensor = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8)
    copy = tensor.clone()
    memory.use_huge_pages(tensor)
    assert torch.equal(tensor, copy)


@pytest.mark.skipif(library.missing() is not None, reason=f"no native kernels: {library.missing()}")
def test_a_frozen_bank_runs_natively() -> None:
    bank = moesaic.freeze(ExpertBank(16, 24, 4))
    assert moesaic.experts.BACKENDS.get("native").refusal(torch.randn(3, 16), bank.weights()) is None
