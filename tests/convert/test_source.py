"""Tensors of a model on disk, one at a time: the same as transformers loads, whatever the files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import byte_tokenizer, dense_folder, dense_model, save

from moesaic.convert import TensorSource, open_source
from moesaic.convert.meter import metered
from moesaic.convert.source import load_tokenizer, sample_places
from moesaic.errors import CheckpointError, MissingDependencyError
from moesaic.hf.load import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return dense_folder(tmp_path / "dense")


def assert_same(source: TensorSource, path: Path) -> None:
    state = load_model(path)[0].state_dict()
    assert set(source.names) == set(state)
    for name, expected in state.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(source.read(name), expected)


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_reads_what_transformers_loads(tmp_path: Path, shard: str) -> None:
    path = save(dense_model(), tmp_path / "dense", max_shard_size=shard)
    assert len(list(path.glob("*.safetensors"))) > (shard == "20KB")
    source = open_source(path)
    assert_same(source, path)
    assert source.config.model_type == "llama"
    assert source.tokenizer_from == path


def test_rows_come_in_memory_of_their_own(folder: Path) -> None:
    source, name = open_source(folder), "model.embed_tokens.weight"
    whole = load_file(folder / "model.safetensors")[name]
    with metered() as meter:
        part = source.read(name, slice(3, 7))
        assert torch.equal(part, whole[3:7])
        assert meter.alive == part.numel() * 4
        part.zero_()
        assert torch.equal(source.read(name), whole)
        del part
    assert (meter.alive, meter.peak) == (0, whole.numel() * 4 + 4 * 32 * 4)


def test_content_is_that_of_every_tensor_and_not_of_the_path(tmp_path: Path) -> None:
    model = dense_model()
    one = save(model, tmp_path / "one")
    content = open_source(one).content()
    shards = save(model, tmp_path / "shards", max_shard_size="20KB")
    shutil.copytree(one, tmp_path / "copy")
    assert open_source(shards).content() == open_source(tmp_path / "copy").content() == content
    state = load_file(one / "model.safetensors")
    for name, tensor in state.items():
        changed = {**state, name: tensor.clone()}
        changed[name].view(-1)[-1] += 1
        save_file(changed, one / "model.safetensors", metadata={"format": "pt"})
        assert open_source(one).content() != content, name
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    assert open_source(one).content() == content
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert open_source(one).content() != content


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, 100_000])
def test_places_that_are_sampled(size: int) -> None:
    first, middle, last = sample_places(size)
    assert first == slice(0, min(4096, size)) and last.stop == size
    assert all(0 <= each.start <= each.stop <= size and each.stop - each.start <= 4096 for each in (middle, last))
    assert abs((middle.start + middle.stop) / 2 - size / 2) <= 1


@pytest.mark.parametrize("part", ["dtype", "shape", "data_offsets"])
def test_a_header_that_lacks_something_is_damaged(folder: Path, part: str) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    del header["model.norm.weight"][part]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(CheckpointError, match=f"does not say the {part} of the tensor model.norm.weight"):
        open_source(folder)


def test_bfloat16_stays_and_fingerprints_tell_bases_apart(tmp_path: Path) -> None:
    model = dense_model()
    one, other = save(model, tmp_path / "one"), dense_folder(tmp_path / "other", seed=1)
    half = save(model.bfloat16(), tmp_path / "half")
    sources = {path.name: open_source(path) for path in (one, other, half)}
    assert sources["half"].dtype("model.norm.weight") == torch.bfloat16
    assert_same(sources["half"], half)
    assert len({source.structure() for source in sources.values()}) == 1
    assert sources["one"].fingerprint() == sources["half"].fingerprint() != sources["other"].fingerprint()
    deeper = open_source(dense_folder(tmp_path / "deeper", num_hidden_layers=3))
    assert deeper.structure() != sources["one"].structure()
    assert open_source(dense_folder(tmp_path / "q", "mistral")).structure() != sources["one"].structure()


def test_the_folder_of_a_training_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.move(folder, tmp_path / "run" / "model")
    source = open_source(tmp_path / "run")
    assert source.tokenizer_from == tmp_path / "run" / "model"
    assert load_tokenizer(source.tokenizer_from).get_vocab() == byte_tokenizer().get_vocab()


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="there is no model folder at"):
        open_source(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"there is no file at .*nothing.gguf"):
        open_source(tmp_path / "nothing.gguf")
    source = open_source(folder)
    for ask in (source.read, source.shape, source.dtype):
        with pytest.raises(CheckpointError, match=r"holds no tensor model\.nonsense"):
            ask("model.nonsense")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package gguf: pip install 'moesaic\[gguf\]'"):
        open_source(tmp_path / "model.gguf")


def test_other_formats_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no weights as safetensors \(it holds pytorch_model.bin\)"):
        open_source(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"\(it holds none\): allowed are model.safetensors"):
        open_source(folder)


def test_damaged_files_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-5], content + b"x", b"\xff" * 8 + content[8:], content[:4], b"{" * 100):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model.safetensors' is damaged"):
            open_source(folder)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"F32"', b'"F77"')
    file.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(CheckpointError, match="of an unknown kind, F77: known are F64, F32"):
        open_source(folder)


def test_a_missing_shard_and_a_damaged_index_are_refused(tmp_path: Path) -> None:
    path = save(dense_model(), tmp_path / "dense", max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete: {shard.name} is missing"):
        open_source(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match=r"index.json' is damaged"):
        open_source(path)


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    source = open_source(folder)
    save_file({"other": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        source.read("model.norm.weight")
