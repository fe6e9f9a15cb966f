"""Adapters on a model in memory: exactly theirs while on, exactly the base's afterwards, and never on another base."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters import bases
from transformers import PreTrainedModel

import moesaic
from moesaic import adapters
from moesaic.adapters import AdapterLayer, Base
from moesaic.adapters.fingerprint import fingerprint
from moesaic.errors import CheckpointError, UnsupportedError, UsageError
from moesaic.hf.quantized import expert_modules


def random_adapter(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Random rows for some experts of every layer of a model, which is their base."""
    generator = torch.Generator().manual_seed(seed)
    layers, tensors = {}, {}
    for number, (name, module) in enumerate(expert_modules(model).items()):
        own = dict(module.named_parameters(recurse=False))
        count = next(iter(own.values())).shape[0]
        experts = [number, count - 1]
        layers[name] = AdapterLayer(experts, [0.5, 0.25], count)
        tensors[name] = {
            key: torch.randn(2, *parameter.shape[1:], generator=generator).to(dtype) for key, parameter in own.items()
        }
    base = Base(fingerprint(model), str(model.config.model_type), "a base")
    return adapters.write_adapter(folder, base, layers, tensors)


def bits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=bases.MOE)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return bases.make(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_and_removing_are_exact(model: PreTrainedModel, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.nn.Module.to(model, dtype)
    path = random_adapter(model, tmp_path / "a", dtype)
    before = bits(model)
    on = adapters.load(model, path)
    assert on.path == path
    wanted = dict(before)
    adapter = adapters.read_adapter(path)
    for name, layer in adapter.layers.items():
        for key, rows in adapter.tensors(name).items():
            wanted[f"{name}.{key}"] = before[f"{name}.{key}"].index_copy(0, torch.tensor(layer.experts), rows)
    assert same(bits(model), wanted)
    on.remove()
    assert same(bits(model), before)


def test_a_merged_model_is_saved_with_the_adapters_bits(model: PreTrainedModel, tmp_path: Path) -> None:
    path = random_adapter(model, tmp_path / "a")
    reference = bits(model)
    adapters.merge(model, path)
    merged = bits(model)
    assert not same(merged, reference)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert same(bits(again), merged)
    names = {name for file in (tmp_path / "merged").glob("*.safetensors") for name in load_file(file)}
    assert not any("tuned" in name for name in names)


def test_as_a_context_it_is_on_inside_only(model: PreTrainedModel, tmp_path: Path) -> None:
    path = random_adapter(model, tmp_path / "a")
    before = bits(model)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        outside = model(input_ids=ids).logits
        with adapters.load(model, path):
            inside = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, outside)
    assert not torch.allclose(inside, outside)
    assert same(bits(model), before)
    with adapters.load(model, path) as on:
        on.merge()
    assert not same(bits(model), before)


def test_a_model_with_an_adapter_goes_when_nobody_holds_it(tmp_path: Path) -> None:
    model = bases.make("ours")
    adapters.load(model, random_adapter(model, tmp_path / "a"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_one_after_the_other(model: PreTrainedModel, tmp_path: Path) -> None:
    first, second = (random_adapter(model, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    before = bits(model)
    on = adapters.load(model, first)
    with pytest.raises(UsageError, match=r"has the adapter '.*1' on it already: remove\(\) or merge\(\) that first"):
        adapters.load(model, second)
    on.remove()
    with pytest.raises(UsageError, match="is not on the model any more"):
        on.remove()
    with pytest.raises(UsageError, match="is not on the model any more"):
        on.merge()
    adapters.load(model, second).remove()
    assert same(bits(model), before)


def test_another_base_is_refused_and_left_as_it_is(model: PreTrainedModel, tmp_path: Path) -> None:
    path = random_adapter(model, tmp_path / "a")
    parameter = next(p for p in model.parameters() if p.ndim == 3)
    parameter.data[1] *= 1.1
    before = bits(model)
    with pytest.raises(CheckpointError, match="was trained from another base model: its fingerprint is v1:"):
        adapters.load(model, path)
    assert same(bits(model), before)


def test_a_merged_model_is_another_base(model: PreTrainedModel, tmp_path: Path) -> None:
    path = random_adapter(model, tmp_path / "a")
    adapters.merge(model, path)
    with pytest.raises(CheckpointError, match="was trained from another base model"):
        adapters.load(model, path)


def test_rows_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = bases.make("ours")
    name = "model.layers.1.mlp.experts"
    base = Base(fingerprint(model), "moesaic", "a base")
    before = bits(model)
    for key, shape in (("up", (1, 3, 3)), ("gate_up_proj", (1, 16, 16))):
        tensors = {
            "model.layers.0.mlp.experts": {"up": torch.zeros(1, 16, 16)},
            name: {key: torch.zeros(shape)},
        }
        layers = {path: AdapterLayer([0], [1.0], 4) for path in tensors}
        path = adapters.write_adapter(tmp_path / "a", base, layers, tensors)
        with pytest.raises(CheckpointError, match=f"does not fit the model: {name}.{key} would have to be"):
            adapters.load(model, path)
        assert same(bits(model), before)


def test_a_bfloat16_base_takes_an_adapter_that_was_trained_in_float32(tmp_path: Path) -> None:
    model = bases.make("olmoe")
    path = random_adapter(model, tmp_path / "a")
    wanted = bases.make("olmoe")
    adapters.merge(wanted, path)
    rounded = torch.nn.Module.to(model, torch.bfloat16)
    adapters.merge(rounded, path)
    assert same(bits(rounded), bits(torch.nn.Module.to(wanted, torch.bfloat16)))


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    model = bases.make("ours")
    path = random_adapter(model, tmp_path / "a")
    moesaic.quantize(model, "int8")
    with pytest.raises(UnsupportedError, match="the experts are quantized"):
        adapters.load(model, path)


def test_a_model_in_a_pool_is_refused(tmp_path: Path) -> None:
    model = bases.make("olmoe")
    path = random_adapter(model, tmp_path / "a")
    pool = adapters.AdapterPool(model)
    with pytest.raises(UsageError, match="are in an AdapterPool: load the adapter there"):
        adapters.load(model, path)
    assert pool.load("a", path) == 1
    pool.close()
    adapters.load(model, path).remove()
