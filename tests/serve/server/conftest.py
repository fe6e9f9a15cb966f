"""A tiny model on disk with two adapters of its own and one of another model, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.serve.server.running import TEMPLATE, Running, serving
from tests.serve.tiny import byte_tokenizer, tiny
from transformers import PreTrainedModel

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import AdapterLayer, Base, write_adapter
from moesaic.hf.quantized import expert_modules
from moesaic.serve.request import EngineSettings
from moesaic.serve.server.build import load

SETTINGS = EngineSettings(kv_bytes=1 << 20, max_batch=16, token_budget=64)


@dataclass(frozen=True)
class Folders:
    """What a server may read: the model, and the folder with the adapters ``poet``, ``law`` and ``stranger``."""

    model: Path
    adapters: Path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("served")
    found = Folders(root / "base", root / "adapters")
    model = tiny("olmoe")
    model.save_pretrained(found.model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(found.model)
    for seed, name in enumerate(("poet", "law")):
        write_random_adapter(found.adapters / name, model, seed)
    write_random_adapter(found.adapters / "stranger", tiny("olmoe", seed=9), 0)
    return found


@pytest.fixture(scope="module")
def served(folders: Folders) -> Iterator[Running]:
    """A server with the adapter ``poet``, which may load others; for tests that leave it as it was."""

    def build() -> object:
        return load(folders.model, SETTINGS, adapters={"poet": folders.adapters / "poet"})

    with serving(build, adapter_folder=folders.adapters) as running:  # type: ignore[arg-type]
        yield running


def write_random_adapter(folder: Path, model: PreTrainedModel, seed: int) -> None:
    """An ESFT adapter with two random experts in each layer."""
    generator = torch.Generator().manual_seed(seed)
    layers, tensors = {}, {}
    for name, module in expert_modules(model).items():
        layers[name] = AdapterLayer([1, 4 + seed], [0.5, 0.2], module.num_experts)
        parameters = dict(module.named_parameters())
        tensors[name] = {
            key: torch.randn((2, *value.shape[1:]), generator=generator) / value.shape[-1] ** 0.5
            for key, value in parameters.items()
        }
    write_adapter(folder, Base(fingerprint(model), "olmoe", "tiny"), layers, tensors)
