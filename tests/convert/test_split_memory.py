"""The memory of a split is what is documented, by a counter of all that is alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.convert.models import dense_folder, dense_model, save
from tests.convert.test_calibration import text_folder
from tests.convert.test_splitting import settings, stop
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.convert import split
from moesaic.convert import splitting as module
from moesaic.convert.meter import Meter, metered


class Allocated(TorchDispatchMode):
    """Bytes alive in all storages that any operation makes: an independent count."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self.meter.watch(tensor)
        return made


def test_memory_is_the_largest_layer_and_a_shard(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 16}
    path = dense_folder(tmp_path / "dense", **sizes)
    state = load_file(path / "model.safetensors")
    largest = sum(tensor.numel() for name, tensor in state.items() if ".layers.0." in name) * 4
    shard = 300_000
    options = settings(text_folder(tmp_path / "text"), shared=64, active=0.5625)
    with metered() as meter:
        split(path, tmp_path / "out", options, shard_bytes=shard)
    assert 0 < meter.peak < 1.3 * largest + shard
    # Writing alone, by a counter that sees every intermediate result too.
    write = module.write_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            split(path, tmp_path / "other", options, shard_bytes=shard)
        with Allocated() as everything:
            patch.setattr(module, "write_model", write)
            split(path, tmp_path / "other", options, shard_bytes=shard)
    assert everything.meter.peak < 1.3 * largest + shard


MEMORY: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"intermediate_size": 512}, {"shared": 64, "active": 0.5625}),
    ({"intermediate_size": 512}, {"criterion": "coactivation", "shared": 64, "active": 0.5625}),
    ({"intermediate_size": 512}, {"criterion": "domain"}),
    ({"hidden_size": 256, "intermediate_size": 64}, {"pre_gating": "stack"}),
    ({"hidden_size": 512, "intermediate_size": 64}, {"tokens": 128}),
    ({"hidden_size": 128, "intermediate_size": 512}, {"criterion": "weight", "tokens": 128}),
    ({"intermediate_size": 64}, {"experts": 32}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "way"), MEMORY, ids=str)
def test_memory_of_a_whole_split_is_what_is_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], way: dict[str, Any], dtype: torch.dtype
) -> None:
    sampled, at_once, shard, itemsize = 1024, 512, 50_000, dtype.itemsize
    monkeypatch.setattr("moesaic.convert.criteria._SAMPLED", sampled)
    monkeypatch.setattr("moesaic.convert.activations._TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr("moesaic.convert.routers._JUDGED", at_once // 2)
    path = save(dense_model(**sizes).to(dtype), tmp_path / "dense")
    state = load_file(path / "model.safetensors")
    largest = sum(tensor.numel() for name, tensor in state.items() if ".layers.0." in name) * itemsize
    options = settings(uneven_text(tmp_path), **{"tokens": 2000, "sequence_length": 120, **way})
    with Allocated() as everything:
        made = split(path, tmp_path / "out", options, shard_bytes=shard)
    tokens, width, hidden = made.tokens, state["model.norm.weight"].numel(), sizes["intermediate_size"]
    calibration = (3 * itemsize + 12) * tokens * width + 40 * tokens * options.experts
    calibration += hidden * (10 * min(tokens, sampled) + 24 * min(tokens, at_once))
    calibration += 24 * width**2 + (20 if options.criterion == "weight" else 4) * hidden * width
    assert 0.9 * options.tokens < tokens <= options.tokens
    assert 0.4 * calibration < everything.meter.peak < calibration + 1.3 * largest + shard


def uneven_text(folder: Path) -> tuple[str, ...]:
    """Half of it in passages of 120 tokens, half of it in very short ones."""
    words = [f"word {number * 7919 % 1000}" for number in range(1000)]
    (folder / "long.txt").write_text(" ".join(words))
    for number, word in enumerate(words[:125]):
        (folder / f"{number}.txt").write_text(word)
    return (f"prose={folder / 'long.txt'}", *(f"words={folder / f'{number}.txt'}" for number in range(125)))
