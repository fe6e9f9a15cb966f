"""PEFT's format: what PEFT writes gives the same logits with us, what we write the same with PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.adapters.lora_models import logits, make, random_lora
from torch import Tensor, nn

from moesaic.adapters.folder import Base
from moesaic.adapters.lora import LoraAdapter, find_targets
from moesaic.adapters.lora_format import is_lora, read_lora, save_lora
from moesaic.adapters.lora_merge import merge_lora
from moesaic.adapters.lora_modules import attach_lora
from moesaic.errors import CheckpointError, UsageError

ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
EXPERTS: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "experts": EXPERTS,
    "both": ATTENTION | {"target_parameters": EXPERTS["target_parameters"], "lora_alpha": 3},
    "down only": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "a regex": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "one layer": ATTENTION | {"layers_to_transform": [1]},
    "rank_pattern": ATTENTION
    | {
        "target_parameters": EXPERTS["target_parameters"],
        "rank_pattern": {"q_proj": 2, "model.layers.0.mlp.experts.gate_up_proj": 7, r".*\.down_proj": 3},
        "alpha_pattern": {"v_proj": 5, r"layers.1.*gate_up_proj": 11},
    },
    "rslora": ATTENTION | {"target_parameters": EXPERTS["target_parameters"], "use_rslora": True, "r": 6},
}


def peft_folder(folder: Path, kind: str, settings: dict[str, Any]) -> Tensor:
    """A random adapter written by PEFT on transformers' own experts; its logits there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for patterns' targets among modules only
        model = get_peft_model(make(kind, "eager"), LoraConfig(**{"r": 4, "init_lora_weights": False} | settings))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        model.eval().save_pretrained(folder)
    return logits(model)


def in_peft(folder: Path, kind: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        return logits(PeftModel.from_pretrained(make(kind, "eager"), str(folder)).eval())


def with_ours(folder: Path, kind: str) -> Tensor:
    model = make(kind)
    attach_lora(model, read_lora(folder, model))
    return logits(model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, settings) for kind in ("olmoe", "qwen3_moe", "mixtral") for settings in SETTINGS],
        *[(kind, "both") for kind in ("gpt_oss", "qwen2_moe", "square")],
    ],
)
def test_peft_adapters_load_in_ours_and_go_back(kind: str, settings: str, tmp_path: Path) -> None:
    wanted = peft_folder(tmp_path / "theirs", kind, SETTINGS[settings])
    assert (wanted - logits(make(kind))).abs().max() > 0.01
    torch.testing.assert_close(with_ours(tmp_path / "theirs", kind), wanted, rtol=0, atol=1e-5)
    model = make(kind)
    adapter = read_lora(tmp_path / "theirs", model)
    save_lora(tmp_path / "ours", adapter, model)
    torch.testing.assert_close(in_peft(tmp_path / "ours", kind), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "olmoe", "gpt_oss", "qwen2_moe", "square"])
def test_our_adapters_load_in_peft(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    adapter = random_lora(model, rank=5)
    save_lora(tmp_path, adapter, model)
    attach_lora(model, adapter)
    torch.testing.assert_close(in_peft(tmp_path, kind), logits(model), rtol=0, atol=1e-5)


def test_chosen_experts_are_zeros_for_the_others_in_peft_and_chosen_again_with_us(tmp_path: Path) -> None:
    model = make("olmoe")
    path = "model.layers.0.mlp.experts"
    adapter = random_lora(model, targets="experts", experts={path: [3, 1]})
    assert {part.experts for part in adapter.parts.values()} == {(1, 3)}
    save_lora(tmp_path, adapter, model)
    back = read_lora(tmp_path, model)
    assert list(back.parts) == [f"{path}.gate_up_proj", f"{path}.down_proj"]
    assert_equal(back, adapter)
    attach_lora(model, adapter)
    torch.testing.assert_close(in_peft(tmp_path, "olmoe"), logits(model), rtol=0, atol=1e-5)


def assert_equal(one: LoraAdapter, other: LoraAdapter) -> None:
    assert one.parts.keys() == other.parts.keys()
    for name, part in one.parts.items():
        wanted = other.parts[name]
        assert torch.equal(part.a, wanted.a) and torch.equal(part.b, wanted.b)
        assert part.experts == wanted.experts and part.scaling == pytest.approx(wanted.scaling, rel=1e-12)


def test_all_that_we_write_comes_back(tmp_path: Path) -> None:
    model = make("olmoe")
    base = Base("v1:abc", "olmoe", "tiny")
    one, two = random_lora(model, rank=3, alpha=7.5), random_lora(model, rank=9, alpha=1.0, seed=5)
    mixed = {name: (one if index % 3 else two).parts[name] for index, name in enumerate(one.parts)}
    adapter = LoraAdapter(mixed, base, {"steps": 3})
    save_lora(tmp_path / "it", adapter, model)
    back = read_lora(tmp_path / "it", model, "v1:abc")
    assert_equal(back, adapter)
    assert (back.base, dict(back.training)) == (base, {"steps": 3})
    assert is_lora(tmp_path / "it")
    save_lora(tmp_path / "it", one, model)  # in its place
    assert read_lora(tmp_path / "it", model).base is None
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_names_are_short_where_they_can_be(tmp_path: Path) -> None:
    model = make("qwen2_moe")
    save_lora(tmp_path, random_lora(model), model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})


@pytest.mark.parametrize("kind", ["qwen3_moe", "square"])
def test_adapters_of_older_peft_have_their_factors_the_other_way_round(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    adapter = random_lora(model, targets="experts")
    save_lora(tmp_path, adapter, model)
    # Before 0.19.1 PEFT took the parameter's two last dimensions for inputs and outputs, in this order.
    tensors = {}
    for key, a in load_file(tmp_path / "adapter_model.safetensors").items():
        if "lora_A" in key:
            b = load_file(tmp_path / "adapter_model.safetensors")[key.replace("lora_A", "lora_B")]
            a_ERI, b_ORE = a.view(4, 4, -1), b.view(-1, 4, 4)
            tensors[key] = b_ORE.permute(2, 1, 0).flatten(0, 1).contiguous()
            tensors[key.replace("lora_A", "lora_B")] = a_ERI.permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    edit(tmp_path, peft_version="0.18.1")
    assert_equal(read_lora(tmp_path, model), adapter)


def edit(folder: Path, file: str = "adapter_config.json", **changes: Any) -> None:
    told = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(told | changes))


def legacy_folder(folder: Path, scale: float = 1.0, **settings: Any) -> dict[str, Tensor]:
    """An adapter of Mixtral as transformers before 5 had it: linear layers w1, w2, w3 of each expert."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, inputs, outputs in (("w1", 32, 24), ("w2", 24, 32), ("w3", 32, 24)):
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(3, inputs, generator=generator) * scale
                tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 3, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_experts_that_were_linear_layers_become_parts_of_the_fused_ones(tmp_path: Path) -> None:
    legacy_folder(tmp_path / "old")
    torch.testing.assert_close(
        with_ours(tmp_path / "old", "mixtral"), in_peft(tmp_path / "old", "mixtral"), rtol=0, atol=1e-5
    )


def test_of_experts_that_were_linear_layers_some_may_be_missing(tmp_path: Path) -> None:
    tensors = legacy_folder(tmp_path / "old", use_rslora=True)
    kept = {key: each for key, each in tensors.items() if ".1.block" in key and (".w3." in key) == (".2.w" in key)}
    save_file(kept, tmp_path / "old" / "adapter_model.safetensors")
    model = make("mixtral")
    adapter = read_lora(tmp_path / "old", model)
    base = make("mixtral").state_dict()
    merge_lora(model, adapter)
    stem = "base_model.model.model.layers.1.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    for name, value in model.state_dict().items():
        wanted = base[name].clone()
        for expert in range(4):
            for half, matrix in enumerate(("w1", "w3", "w2")):
                if (key := stem.format(expert, matrix, "A")) not in kept:
                    continue
                delta = kept[key.replace("lora_A", "lora_B")] @ kept[key] * (6 / 3**0.5)
                if half < 2 and name == "model.layers.1.mlp.experts.gate_up_proj":
                    wanted[expert, 24 * half : 24 * (half + 1)] += delta
                if half == 2 and name == "model.layers.1.mlp.experts.down_proj":
                    wanted[expert] += delta
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def no_rank(folder: Path) -> None:
    edit(folder, rank_pattern={"model.layers.0.self_attn.q_proj": 0})

    def empty(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"][:0].clone()
        tensors[f"{Q}.lora_B.weight"] = tensors[f"{Q}.lora_B.weight"][:, :0].clone()

    retensor(empty)(folder)


UP = "base_model.model.model.layers.0.mlp.experts.base_layer"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "there is no adapter at"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model"),
    "truncated": (truncate, "damaged or truncated"),
    "config no json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    "config too deep": (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
    "config a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no JSON object"),
    "another method": (lambda folder: edit(folder, peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (lambda folder: edit(folder, use_dora=True), "use_dora = True is not supported"),
    "bias": (lambda folder: edit(folder, bias="all"), "bias = 'all' is not supported"),
    "lora_bias": (lambda folder: edit(folder, lora_bias=True), "lora_bias = True"),
    "modules_to_save": (lambda folder: edit(folder, modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (lambda folder: edit(folder, init_lora_weights="pissa_niter_4"), "changes the base"),
    "a rank that is none": (lambda folder: edit(folder, r=5), "is 5 by its settings, but 4 by its tensors"),
    "alpha a word": (lambda folder: edit(folder, lora_alpha="8"), "lora_alpha of .* is '8'"),
    "alpha no number": (lambda folder: edit(folder, lora_alpha=float("nan")), "lora_alpha of .* is nan"),
    "alpha beyond float32": (lambda folder: edit(folder, lora_alpha=1e39), r"lora_alpha of .* is 1e\+39"),
    "parameters a number": (lambda folder: edit(folder, target_parameters=5), "target_parameters = 5 is no list"),
    "parameters a word": (lambda folder: edit(folder, target_parameters="a"), "target_parameters = 'a' is no list"),
    "no rank": (no_rank, "is 0 by its settings, but 0 by its tensors"),
    "a pattern that is none": (lambda folder: edit(folder, rank_pattern={"(": 4}), "is no pattern"),
    "patterns a list": (lambda folder: edit(folder, alpha_pattern=[1]), "alpha_pattern is no JSON object"),
    "B missing": (retensor(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")), "there is lora_A only"),
    "a module missing": (
        retensor(lambda tensors: [tensors.pop(f"{Q}.lora_{side}.weight") for side in "AB"]),
        "no part for it",
    ),
    "a stranger": (
        retensor(lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.zeros(3)})),
        "is none of LoRA",
    ),
    "codes": (
        retensor(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)})),
        "is none of LoRA",
    ),
    "an unknown module": (
        retensor(lambda tensors: tensors.update({f"{Q}x.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"})),
        "the base has no such linear layer",
    ),
    "the router": (
        retensor(
            lambda tensors: tensors.update(
                {f"base_model.model.model.layers.0.mlp.gate.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
            )
        ),
        "the base has no such linear layer",
    ),
    "another width": (
        retensor(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(4, 33)})),
        r"takes A and B of shapes",
    ),
    "another number of experts": (
        retensor(lambda tensors: tensors.update({f"{UP}.lora_A.weight": torch.zeros(18, 32)})),
        "are no parts of 4 experts",
    ),
    "empty": (retensor(lambda tensors: tensors.clear()), "is empty"),
    "extra of a later version": (lambda folder: edit(folder, "moesaic.json", version=2), "version 1"),
    "extra without experts": (lambda folder: edit(folder, "moesaic.json", experts=None), "nothing usable"),
    "extra with a strange expert": (
        lambda folder: edit(folder, "moesaic.json", experts={"model.layers.0.mlp.experts.down_proj": [4]}),
        r"names experts \[4\]",
    ),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make("olmoe")


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_refused_and_said(case: str, model: nn.Module, tmp_path: Path) -> None:
    damage, message = BROKEN[case]
    save_lora(tmp_path, random_lora(model), model)  # type: ignore[arg-type]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as told:
        read_lora(tmp_path, model)
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)


def test_an_adapter_of_another_base_is_refused(model: nn.Module, tmp_path: Path) -> None:
    adapter = replace(random_lora(model), base=Base("v1:abc", "olmoe", "tiny"))  # type: ignore[arg-type]
    save_lora(tmp_path, adapter, model)
    with pytest.raises(CheckpointError, match=r"trained from 'tiny' \(v1:abc\), and this base is another"):
        read_lora(tmp_path, model, "v1:def")
    with pytest.raises(CheckpointError, match="the base has no such linear layer"):
        read_lora(tmp_path, nn.Sequential(nn.Linear(2, 2)))


def test_it_is_not_written_where_it_does_not_fit_or_cannot_be(model: nn.Module, tmp_path: Path) -> None:
    adapter = random_lora(model)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="which the model does not have"):
        save_lora(tmp_path / "it", adapter, nn.Linear(2, 2))
    name, part = next(iter(adapter.parts.items()))
    wrong = LoraAdapter({name: replace(part, a=part.a[..., 1:])})
    with pytest.raises(CheckpointError, match="takes A and B"):
        save_lora(tmp_path / "it", wrong, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        save_lora(tmp_path / "file" / "it", adapter, model)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_targets_are_all_linear_layers_and_experts(model: nn.Module) -> None:
    targets = find_targets(model)
    assert len(targets) == 2 * (2 + 4) + 1
    up = targets["model.layers.0.mlp.experts.gate_up_proj"]
    assert (up.inputs, up.outputs, up.num_experts, up.peft_name) == (32, 48, 4, up.name)
    assert targets["model.layers.1.self_attn.k_proj.weight"].peft_name == "model.layers.1.self_attn.k_proj"
