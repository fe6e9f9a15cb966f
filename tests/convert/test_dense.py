"""Which dense models are taken, and that their attention is taken over: our dense layers compute what theirs do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import SIZES, byte_tokenizer, dense_folder
from transformers import GemmaConfig, MixtralConfig

from moesaic.convert import check_dense, open_source
from moesaic.convert.dense import ACTIVATION, EXPERT_COUNTS, is_moe
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.load import load_model

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"rms_norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_all_but_the_feed_forward_is_taken_over(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Our model with dense layers of the same weights gives the same logits."""
    path = dense_folder(tmp_path / "dense", family, **changes)
    theirs = load_model(path)[0]
    dense = check_dense(open_source(path))
    config = dense.moe_config(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[0, 1])
    assert config.expert_activation == ACTIVATION[theirs.config.hidden_act]
    ours = MoesaicForCausalLM(config).eval()
    kept = [*dense.outside(), *(name for layer in range(2) for name in (*dense.ffn(layer), *dense.others(layer)))]
    assert sorted(kept) == sorted(dense.source.names)
    missing = ours.load_state_dict({name: dense.source.read(name) for name in kept}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    ours.tie_weights()
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_sizes_and_names(tmp_path: Path) -> None:
    dense = check_dense(open_source(dense_folder(tmp_path / "dense")))
    assert (dense.d_model, dense.d_ff, dense.num_layers, dense.dtype) == (32, 48, 2, torch.float32)
    assert dense.dense_parameters() == 3 * 32 * 48
    assert dense.ffn(1).down == "model.layers.1.mlp.down_proj.weight"
    assert dense.moe_config(num_experts=8).architectures == ["MoesaicForCausalLM"]


def change(path: Path, **settings: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "relu"}, "has hidden_act 'relu': supported are silu, swish, gelu"),
        ({"mlp_bias": True}, r"has biases in its feed-forward \(mlp_bias\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "has quantized weights"),
    ],
)
def test_settings_that_we_lack(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = change(dense_folder(tmp_path / "dense"), **settings)
    with pytest.raises(UnsupportedError, match=message):
        check_dense(open_source(path))


def test_a_window_in_some_layers_only(tmp_path: Path) -> None:
    options = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    path = dense_folder(tmp_path / "dense", "qwen2", **options)
    with pytest.raises(UnsupportedError, match="a sliding window in some layers only"):
        check_dense(open_source(path))


def test_a_mixture_and_another_architecture(tmp_path: Path) -> None:
    for config, message in (
        (MixtralConfig(**SIZES), r"is a mixture of experts already \(mixtral\): prune takes it"),
        (GemmaConfig(**SIZES), "is a 'gemma': supported are the dense models llama, mistral, qwen2, qwen3"),
    ):
        path = tmp_path / config.model_type
        config.save_pretrained(path)
        save_file({"model.norm.weight": torch.zeros(32)}, path / "model.safetensors")
        byte_tokenizer().save_pretrained(path)
        source = open_source(path)
        assert is_moe(source) == (config.model_type == "mixtral")
        with pytest.raises(UnsupportedError, match=message):
            check_dense(source)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_tensor_that_is_missing(tmp_path: Path, name: str) -> None:
    path = dense_folder(tmp_path / "dense")
    state = load_file(path / "model.safetensors")
    save_file({other: tensor.clone() for other, tensor in state.items() if other != name}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is incomplete: it holds no {name}"):
        check_dense(open_source(path))


def test_tensors_that_would_be_lost(tmp_path: Path) -> None:
    path = dense_folder(tmp_path / "dense")
    state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | computed, path / "model.safetensors")
    check_dense(open_source(path))
    save_file(state | {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}, path / "model.safetensors")
    with pytest.raises(
        UnsupportedError,
        match=r"holds model.layers.1.self_attn.q_proj.bias, which its configuration \(llama\) does not",
    ):
        check_dense(open_source(path))


def test_a_stored_head_that_is_the_embedding(tmp_path: Path) -> None:
    path = dense_folder(tmp_path / "dense", tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    assert "lm_head.weight" not in check_dense(open_source(path)).outside()


@pytest.mark.parametrize("name", EXPERT_COUNTS)
def test_every_name_of_the_number_of_experts_tells_of_a_mixture(tmp_path: Path, name: str) -> None:
    assert is_moe(open_source(change(dense_folder(tmp_path / "dense"), **{name: 4})))


def test_shapes_and_values_that_do_not_fit(tmp_path: Path) -> None:
    path = change(dense_folder(tmp_path / "dense"), intermediate_size=50)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight of shape \[48, 32\], configured is \[50, 32\]"):
        check_dense(open_source(path))
    path = change(path, intermediate_size=48)
    state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    state["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    save_file(state, path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"gate_proj.weight as torch.int8: supported are torch.float32, torch.b"):
        check_dense(open_source(path))
    state["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(48, 32).to(torch.float8_e4m3fn)
    save_file(state, path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"gate_proj.weight as torch.float8_e4m3fn: supported are torch.float32"):
        check_dense(open_source(path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_has_the_shape_that_the_configuration_says(tmp_path: Path, family: str) -> None:
    path = dense_folder(tmp_path / "dense", family, num_hidden_layers=1, head_dim=16)
    state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    check_dense(open_source(path))
    for name, tensor in state.items():
        save_file({**state, name: torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:])}, path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name} of shape \[{tensor.shape[0] + 1}.*, configured is \["):
            check_dense(open_source(path))
