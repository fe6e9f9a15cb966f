"""A model that is read a layer at a time is the model that is read at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.mixtures import FAMILIES, mixture, mixture_folder
from tests.convert.models import save
from torch import Tensor

from moesaic.convert import open_source
from moesaic.convert.meter import metered
from moesaic.convert.streaming import StreamedModel
from moesaic.errors import UnsupportedError
from moesaic.hf.load import load_model
from moesaic.hf.placement import moe_blocks


def last_hidden(folder: Path, ids: Tensor) -> tuple[Tensor, StreamedModel]:
    streamed = StreamedModel(open_source(folder), moe_blocks(folder))
    seen: list[Tensor] = []
    streamed.model.base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    streamed.run(ids)
    return seen[0], streamed


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same(family: str, tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path, family)
    ids = torch.randint(0, 256, (2, 30))
    whole, _ = load_model(folder, device="cpu")
    with torch.no_grad():
        expected = whole.base_model(input_ids=ids).last_hidden_state
    with metered() as meter:
        found, streamed = last_hidden(folder, ids)
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert meter.alive == 0
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    folder = save(mixture("qwen3_moe").to(torch.bfloat16), tmp_path)
    ids = torch.randint(0, 256, (2, 30))
    whole, _ = load_model(folder, device="cpu")
    with torch.no_grad():
        expected = whole.base_model(input_ids=ids).last_hidden_state
    found, _ = last_hidden(folder, ids)
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().norm() / expected.float().norm() < 0.02


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path, "mixtral", num_hidden_layers=4)
    source = open_source(folder)
    layers: dict[str, int] = {}
    for name in source.names:
        if ".layers." in name:
            number = name.split(".")[2]
            layers[number] = layers.get(number, 0) + 4 * torch.Size(source.shape(name)).numel()
    with metered() as meter:
        last_hidden(folder, torch.randint(0, 256, (1, 8)))
    assert max(layers.values()) <= meter.peak < 1.3 * max(layers.values())


def test_weights_go_even_where_a_forward_fails(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path, "olmoe")
    streamed = StreamedModel(open_source(folder), moe_blocks(folder))

    def fail(module: object, args: object) -> None:
        raise RuntimeError("stop here")

    streamed.model.get_submodule("model.layers.1.mlp.experts").register_forward_pre_hook(fail)
    with metered() as meter, pytest.raises(RuntimeError, match="stop here"):
        streamed.run(torch.zeros(1, 4, dtype=torch.int64))
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert meter.alive == 0


def test_a_missing_tensor_is_named_before_anything_runs(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path, "qwen2_moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"holds no model\.layers\.1\.self_attn\.k_proj\.weight"):
        StreamedModel(open_source(folder), moe_blocks(folder))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    import moesaic

    folder = save(moesaic.quantize(mixture("moesaic", hidden_size=32, moe_intermediate_size=32), "int8"), tmp_path)
    with pytest.raises(UnsupportedError, match="has quantized weights, which cannot be run a layer at a time"):
        StreamedModel(open_source(folder), moe_blocks(folder))
