"""GGUF files give transformers' tensors: names, and the rows of queries and keys in transformers' order."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.convert.models import dense_model
from tokenizers.pre_tokenizers import ByteLevel

from moesaic.convert import UpcycleSettings, check_dense, open_source, unpack, upcycle
from moesaic.convert.gguf_source import transformers_name
from moesaic.errors import CheckpointError, UnsupportedError

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def theirs(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row as llama.cpp has them: of each head row 0, row half, row 1, row half + 1, and so on."""
    size = weight.shape[0] // heads
    order = []
    for head in range(heads):
        for pair in range(size // 2):
            order += [head * size + pair, head * size + size // 2 + pair]
    return weight[order]


def write(
    path: Path,
    family: str = "llama",
    extra: dict[str, Any] | None = None,
    scaling: dict[str, str | float] | None = None,
    kinds: tuple[str, ...] = (),
    tokenizer: bool = False,
    **options: Any,
) -> dict[str, Any]:
    model = dense_model(family, **options)
    config, state = model.config, model.state_dict()
    arch = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if (head_dim := getattr(config, "head_dim", None) or 8) != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (scaling or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{arch}.rope.{key}", value)
    quantized: dict[str, Any] = {}
    if tokenizer:
        alphabet = sorted(ByteLevel.alphabet())
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*alphabet, "<|endoftext|>", "ab"])
        writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL])
        writer.add_token_merges(["a b"])
        for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
            add(256)
    for name, tensor in state.items():
        if arch == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        elif arch == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        if kinds and tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType[kinds[len(quantized) % len(kinds)]]
            quantized[name] = kind
            writer.add_tensor(theirs(name), gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs(name), tensor.numpy())
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, kind in quantized.items():
        state[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(state[name].numpy(), kind), kind).copy())
    return state


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    path = tmp_path / "model.gguf"
    state = write(path, family)
    source = open_source(path)
    assert set(source.names) == set(state)
    for name, expected in state.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(expected.shape), torch.float32)
        assert torch.equal(source.read(name), expected), name
        assert torch.equal(source.read(name, slice(1, 5)), expected[1:5]), name
    assert source.config.model_type == family
    assert check_dense(source).d_ff == 48
    write(path, family, head_dim=16)
    assert check_dense(open_source(path)).moe_config().head_dim == 16


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantized_tensors_come_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr("moesaic.convert.gguf_source._VALUES_AT_ONCE", 100)  # 3 rows, or 1
    path = tmp_path / "model.gguf"
    state = write(path, family, kinds=("Q8_0", "Q4_1", "F16", "BF16", "Q4_0"), intermediate_size=96)
    source = open_source(path)
    for name, expected in state.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(expected.shape), torch.float32)
        assert torch.equal(source.read(name), expected), name
        for rows in (slice(1, 5), slice(3, None), slice(0, 0), slice(7, 100)):
            assert torch.equal(source.read(name, rows), expected[rows]), name


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_reading_takes_little_memory_beside_the_tensor(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    sizes = {"hidden_size": 512, "head_dim": 2048, "vocab_size": 8192, "num_hidden_layers": 1, "intermediate_size": 64}
    write(path, kinds=("Q8_0",), **sizes)
    source = open_source(path)
    source.read(name, slice(0, 1))
    tracemalloc.start()  # sees what numpy has, and not what torch has
    tensor = source.read(name)
    beside = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensor.numel() * 4 >= 1 << 24 and beside < 1 << 22


def test_values_that_gguf_cannot_read_are_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", extra={"blk.1.attn_q.bias": torch.ones(32, dtype=torch.int16)})
    with pytest.raises(UnsupportedError, match=r"holds model.layers.1.self_attn.q_proj.bias as I16, which the package"):
        open_source(tmp_path / "model.gguf")


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path)
    whole = path.read_bytes()
    for length in (0, 3, 4, 20, 100, 333, 1000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"model.gguf' is no sound GGUF file, it is damaged or ends too early: "
        ):
            open_source(path)


def test_values_do_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    state = write(path)
    source = open_source(path)
    source.read("model.norm.weight").zero_()
    assert torch.equal(source.read("model.norm.weight"), state["model.norm.weight"])


def test_what_gguf_can_hold_and_we_cannot(tmp_path: Path) -> None:
    write(tmp_path / "rope.gguf", extra={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(UnsupportedError, match="rescaled rotary frequencies: give the model's safetensors folder"):
        open_source(tmp_path / "rope.gguf")
    write(tmp_path / "moe.gguf", extra={"blk.0.ffn_gate_inp.weight": torch.ones(4, 32)})
    with pytest.raises(UnsupportedError, match=r"is a mixture of experts: .* --method prune"):
        open_source(tmp_path / "moe.gguf")
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="holds a 'gemma2': supported are llama, qwen2, qwen3"):
        open_source(tmp_path / "gemma.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF at all")
    with pytest.raises(CheckpointError, match="is no sound GGUF file"):
        open_source(tmp_path / "text.gguf")
    write(tmp_path / "model.gguf")
    source = open_source(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="holds no tensor nonsense"):
        source.read("nonsense")


@pytest.mark.parametrize(
    ("scaling", "kind"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, "linear"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, "yarn"),
        ({"scaling.factor": 4.0}, "linear"),
        ({"scale_linear": 2.0}, "linear"),
    ],
)
def test_scaled_rotary_frequencies(tmp_path: Path, scaling: dict[str, str | float], kind: str) -> None:
    write(tmp_path / "model.gguf", "qwen2", scaling=scaling)
    with pytest.raises(UnsupportedError, match=rf"frequencies \(rope.scaling.type {kind}\): give the model's safetens"):
        open_source(tmp_path / "model.gguf")


@pytest.mark.parametrize("scaling", [{"scaling.type": "none", "scaling.factor": 4.0}, {"scaling.factor": 1.0}])
def test_frequencies_that_are_not_scaled(tmp_path: Path, scaling: dict[str, str | float]) -> None:
    write(tmp_path / "model.gguf", scaling=scaling)
    assert open_source(tmp_path / "model.gguf").config.model_type == "llama"


def test_tensors_that_would_be_lost(tmp_path: Path) -> None:
    write(tmp_path / "bias.gguf", extra={"blk.1.attn_q.bias": torch.ones(32)})
    with pytest.raises(UnsupportedError, match=r"holds model.layers.1.self_attn.q_proj.bias, which .* would be lost"):
        check_dense(open_source(tmp_path / "bias.gguf"))
    write(tmp_path / "other.gguf", extra={"blk.0.attn_sinks.weight": torch.ones(4)})
    with pytest.raises(UnsupportedError, match=r"holds blk.0.attn_sinks.weight, which no llama that is supported has"):
        open_source(tmp_path / "other.gguf")


@pytest.mark.parametrize("method", ["upcycle", "dense"])
def test_a_tokenizer_that_cannot_be_loaded_is_refused_at_once(tmp_path: Path, method: str) -> None:
    write(tmp_path / "model.gguf")  # has none
    said: list[str] = []
    convert = unpack if method == "dense" else partial(upcycle, settings=UpcycleSettings(num_experts=2, top_k=1))
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*model.gguf' cannot be loaded"):
        convert(tmp_path / "model.gguf", tmp_path / "out", say=said.append)
    assert said == [] and [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_names() -> None:
    assert transformers_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"
    assert transformers_name("output.weight") == "lm_head.weight"
    assert transformers_name("blk.0.attn_rot_embd.weight") is None
    assert transformers_name("rope_freqs.weight") is None
