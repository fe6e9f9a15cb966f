"""Quantized experts in whole models: saved, loaded, quantized on load, refused, dequantized, exported."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.reference import relative_error
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

import moesaic
from moesaic.errors import CheckpointError, ConfigError, UnsupportedError
from moesaic.experts import ExpertBank
from moesaic.hf.export import export_folder, export_qwen3_moe
from moesaic.hf.load import load_model
from moesaic.hf.quantized import QuantizedExperts

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
QWEN: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "ours": lambda: moesaic.MoesaicConfig(**SIZES, **QWEN, expert_bias=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **QWEN),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),  # its checkpoints name the experts otherwise
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),  # transposed
}
KINDS = pytest.mark.parametrize("kind", list(CONFIGS))
IDS = torch.arange(1, 13).view(2, 6)


def make(kind: str, implementation: str = "moesaic") -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        CONFIGS[kind](), experts_implementation=implementation, attn_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad(), moesaic.use_backend("loop"):
        result: Tensor = model(IDS).logits
    return result


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0} | {chr(33 + i): i for i in range(1, VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    return model


@pytest.mark.parametrize(("format", "group"), [("int8", None), ("int4", 32)])
@KINDS
def test_saved_loaded_and_quantized_on_load(kind: str, format: str, group: int | None, tmp_path: Path) -> None:
    model = make(kind)
    before = logits(model)
    model.save_pretrained(tmp_path / "float")
    assert moesaic.quantize(model, format, group=group) is model
    wanted = logits(model)
    assert 0 < relative_error(wanted, before) < (0.1 if format == "int8" else 0.5)

    model.save_pretrained(tmp_path / "codes")
    saved = load_file(tmp_path / "codes" / "model.safetensors")
    names = {name.split(".", 3)[3] for name in saved if name.startswith("model.layers.0") and "experts" in name}
    up = "up" if kind == "ours" else "gate_up"
    assert {name.rsplit(".", 1)[1] for name in names if "bias" not in name} == {
        f"{up}_codes",
        f"{up}_scale",
        "down_codes",
        "down_scale",
    }
    settings = json.loads((tmp_path / "codes" / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "moesaic", "format": format, "group": group}

    loaded = load(tmp_path / "codes")
    assert loaded.config._experts_implementation == "moesaic" or kind == "ours"
    assert torch.equal(logits(loaded), wanted)
    on_load = load(tmp_path / "float", quantization_config=moesaic.QuantizationConfig(format, group))
    assert torch.equal(logits(on_load), wanted)
    on_load.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@KINDS
def test_in_another_dtype(kind: str, tmp_path: Path) -> None:
    moesaic.quantize(make(kind), "int8").save_pretrained(tmp_path)
    full, half = load(tmp_path), load(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    scales = [(name, buffer) for name, buffer in half.named_buffers() if name.endswith("_scale")]
    assert len(scales) == 4
    for name, buffer in scales:
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, full.get_buffer(name))
    assert logits(half).dtype == torch.bfloat16
    moved = copy.deepcopy(full).to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert all(torch.equal(moved.get_buffer(name), buffer) for name, buffer in scales)


@KINDS
def test_load_model_loads_codes(kind: str, tmp_path: Path) -> None:
    model = moesaic.quantize(make(kind), "int4")
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), wanted)


@KINDS
def test_copies_pickles_and_floats_again(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    original = type(model.model.layers[0].mlp.experts)
    names = model.state_dict().keys()
    moesaic.quantize(model, "int4")
    wanted, stream = logits(model), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(logits(copied), wanted)
        assert type(copied.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)
    plain = model.dequantize()
    assert type(plain.model.layers[0].mlp.experts) is original
    assert plain.state_dict().keys() == names
    assert relative_error(logits(plain), wanted) < 1e-6
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert relative_error(logits(load(tmp_path)), wanted) < 1e-6


def test_experts_of_other_implementations_are_refused(tmp_path: Path) -> None:
    for other in ("eager", "batched_mm"):
        with pytest.raises(UnsupportedError, match=f"'moesaic' only, but the model has '{other}'"):
            moesaic.quantize(make("olmoe", other), "int8")
    model = moesaic.quantize(make("olmoe"), "int8")
    model.save_pretrained(tmp_path)
    model.set_experts_implementation("eager")
    with pytest.raises(
        UnsupportedError, match=r"'moesaic' only, but .* 'eager': call model.set_experts_implementation"
    ):
        model(IDS)
    with pytest.raises(UnsupportedError, match="'moesaic' only, not with 'eager'"):
        load(tmp_path, experts_implementation="eager")


def test_what_cannot_be_quantized() -> None:
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts to quantize"):
        moesaic.quantize(dense, "int8")
    model = moesaic.quantize(make("olmoe"), "int8")
    with pytest.raises(ConfigError, match="quantized already, as int8"):
        moesaic.quantize(model, "int4")
    model = make("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = torch.inf
    with pytest.raises(ConfigError, match="down_proj has weights that are not finite"):
        moesaic.quantize(model, "int8")
    assert torch.isfinite(model.model.layers[0].mlp.experts.gate_up_proj).all()


def test_on_load_too(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"):
        load(tmp_path / "dense", quantization_config=moesaic.QuantizationConfig("int8"))
    model = make("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.down_proj cannot be quantized: expert 2 has"):
        load(tmp_path / "nan", quantization_config=moesaic.QuantizationConfig("int8"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int2"}, "unknown weight format 'int2'"),
        ({"format": "int4", "group": 16}, "group is 16: it must be one of 32, 64"),
        ({"format": "int4", "bits": 4}, "the quantization has no setting bits; it has format and group"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    ],
)
def test_settings_that_there_are_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moesaic.QuantizationConfig(**settings)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "model"
    moesaic.quantize(make("qwen3_moe"), "int4").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


SCALE = "model.layers.1.mlp.experts.down_scale"
CODES = "model.layers.0.mlp.experts.gate_up_codes"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing scale": (lambda state: state.pop(SCALE), f"{SCALE} is missing"),
    "missing codes": (lambda state: state.pop(CODES), f"{CODES} is missing"),
    "infinite scale": (
        lambda state: state[SCALE][1, 2].fill_(torch.inf),
        f"{SCALE} holds scales that are not finite: the checkpoint is damaged",
    ),
    "short codes": (
        lambda state: state.update({CODES: state[CODES][:, :-1].clone()}),
        rf"{CODES} (is missing or has another shape|\(saved \[4, 47, 64\], configured \[4, 48, 64\]\))",
    ),
    "another group": (
        lambda state: state.update({SCALE: state[SCALE].repeat_interleave(2, -1)}),
        rf"{SCALE} (is missing or has another shape|\(saved \[4, 32, 4\], configured \[4, 32, 2\]\))",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_checkpoints(damage: str, codes: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(codes, tmp_path / "broken")
    do, message = DAMAGES[damage]
    state = load_file(folder / "model.safetensors")
    do(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    # transformers alone reports what has another shape by an error of its own.
    with pytest.raises((CheckpointError, RuntimeError)):
        load(folder)


def test_a_checkpoint_in_another_format_than_it_says(codes: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(codes, tmp_path / "broken")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "moesaic", "format": "int8"}}))
    with pytest.raises(CheckpointError, match="do not match their configuration"):
        load_model(folder)


def test_only_what_comes_before_the_experts_is_trained() -> None:
    model = moesaic.quantize(make("ours"), "int4").train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.endswith(("experts.up", "experts.down")) for name in trained)
    with moesaic.use_backend("loop"):
        model(IDS, labels=IDS).loss.backward()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.router.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().sum() > 0


def test_generation_and_the_kept_parts(tmp_path: Path) -> None:
    model = make("ours")
    others = {name: value.clone() for name, value in model.state_dict().items() if "experts" not in name}
    moesaic.quantize(model, "int8")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in others.items())
    with moesaic.use_backend("loop"):
        made = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 10)


def test_export_writes_floats(tmp_path: Path) -> None:
    config = AutoConfig.for_model("moesaic", **SIZES, **QWEN)
    torch.manual_seed(0)
    model = moesaic.quantize(moesaic.MoesaicForCausalLM(config).eval(), "int4")
    wanted = logits(model)
    with pytest.raises(UnsupportedError, match=r"no quantized experts: call model.dequantize\(\) first"):
        export_qwen3_moe(model)
    model.save_pretrained(tmp_path / "codes")
    tokenizer().save_pretrained(tmp_path / "codes")
    exported, _ = load_model(export_folder(tmp_path / "codes", tmp_path / "plain"), device="cpu")
    assert type(exported).__name__ == "Qwen3MoeForCausalLM"
    assert relative_error(logits(exported), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["ours", "gpt_oss"])
def test_calibration(kind: str) -> None:
    """The scales follow the text that the model is calibrated on: they change, and by reason of it."""
    model = make(kind)
    wanted = logits(model)
    plain = moesaic.quantize(copy.deepcopy(model), "int4", group=32)
    with moesaic.use_backend("loop"):
        told = moesaic.quantize(copy.deepcopy(model), "int4", group=32, calibration=[IDS, IDS])
    assert not torch.equal(logits(told), logits(plain))
    assert relative_error(logits(told), wanted) < 1.5 * relative_error(logits(plain), wanted)
    with pytest.raises(ConfigError, match=r"token ids \[B, S\]: batch 0 is torch.float32 of shape \[2, 3\]"):
        moesaic.quantize(copy.deepcopy(model), "int4", calibration=[torch.ones(2, 3)])
    with pytest.raises(ConfigError, match="calibration has no token ids"):
        moesaic.quantize(copy.deepcopy(model), "int4", calibration=[])
    with pytest.raises(ConfigError, match="takes token ids"):
        moesaic.quantize(ExpertBank(8, 8, 2), "int4", calibration=[IDS])


def test_the_class_is_made_once() -> None:
    first, second = (moesaic.quantize(make("olmoe"), "int8") for _ in range(2))
    experts = first.model.layers[0].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    assert type(experts).__name__ == "QuantizedOlmoeExperts"
    assert type(experts) is type(second.model.layers[1].mlp.experts)


@pytest.mark.parametrize("refusal", ["not finite", "calibration"])
def test_a_refused_model_is_unchanged(refusal: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["olmoe"](), experts_implementation="moesaic")
    first, last = (layer.mlp.experts for layer in model.model.layers)
    before = type(first)
    calibration = [torch.ones(2, 3)] if refusal == "calibration" else None
    if calibration is None:
        with torch.no_grad():
            last.down_proj[0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=refusal):
        moesaic.quantize(model, "int8", calibration=calibration)
    assert type(first) is type(last) is before and before.__name__ == "OlmoeExperts"


@pytest.mark.parametrize("format", [None, 8, ["int4"]])
def test_a_format_that_is_no_name(format: Any) -> None:
    with pytest.raises(ConfigError, match="it must be one of int8, int4"):
        moesaic.QuantizationConfig(format)


def test_a_bank_takes_codes_once_it_is_quantized() -> None:
    saved, fresh = (moesaic.quantize(ExpertBank(32, 48, 4), "int4", group=32) for _ in range(2))
    fresh.load_state_dict(saved.state_dict())
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in fresh.state_dict().items())
