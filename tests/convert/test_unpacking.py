"""A dense model written out as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.convert.models import dense_folder, dense_model, save
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moesaic.convert import unpack
from moesaic.convert.meter import metered
from moesaic.errors import CheckpointError, UnsupportedError


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_tensor_is_what_it_was(tmp_path: Path, family: str) -> None:
    dense = dense_model(family).to(torch.bfloat16)
    save(dense, tmp_path / "dense")
    with metered() as meter:
        written = unpack(tmp_path / "dense", tmp_path / "out", shard_bytes=20_000)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert written.shards > 1 and written.parameters == sum(value.numel() for value in state.values())
    assert meter.peak < 2 * 20_000 + 260 * 32 * 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [type(dense).__name__] and config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_what_a_configuration_does_not_say_is_said(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    del config["architectures"], config["dtype"]
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    unpack(tmp_path / "dense", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"


def test_an_interrupted_start_goes_on_with_the_same_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = dense_folder(tmp_path / "dense")
    monkeypatch.setattr("moesaic.convert.writing._finish", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, tmp_path / "out")
    monkeypatch.undo()
    other = dense_folder(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"with other settings \(model: 'v1:"):
        unpack(other, tmp_path / "out")
    path.rename(tmp_path / "moved")
    assert unpack(tmp_path / "moved", tmp_path / "out").resumed == 1


def test_what_cannot_be_unpacked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    dense_folder(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="exists"):
        unpack(tmp_path / "dense", tmp_path / "there")
    config = MixtralConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(UnsupportedError, match="is a mixture of experts already"):
        unpack(tmp_path / "mixtral", tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no model folder at"):
        unpack(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
