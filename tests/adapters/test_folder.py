"""The adapter folder: what is written comes back, and what is damaged is refused with its reason."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moesaic.adapters import AdapterLayer, Base, adapter_folder, read_adapter, write_adapter
from moesaic.errors import CheckpointError, UsageError

BASE = Base("v1:00", "olmoe", "some base")
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
LAYERS = {SECOND: AdapterLayer([0], [0.6], 4), FIRST: AdapterLayer([1, 3], [0.25, 0.5], 4)}


def rows() -> dict[str, dict[str, torch.Tensor]]:
    return {
        FIRST: {"up": torch.randn(2, 6, 4), "up_bias": torch.randn(2, 6)},
        SECOND: {"up": torch.randn(1, 6, 4, dtype=torch.bfloat16), "up_bias": torch.randn(1, 6)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "one", BASE, LAYERS, rows(), {"steps": 3})


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    tensors = rows()
    adapter = read_adapter(write_adapter(tmp_path / "one", BASE, LAYERS, tensors, {"steps": 3}))
    assert (adapter.base, adapter.layers, adapter.training) == (BASE, LAYERS, {"steps": 3})
    assert list(adapter.layers) == [FIRST, SECOND]
    assert adapter.fingerprint == "v1:00"
    assert adapter.bytes == sum(part.nbytes for layer in tensors.values() for part in layer.values())
    for name, parts in tensors.items():
        found = adapter.tensors(name)
        assert found.keys() == parts.keys()
        assert all(torch.equal(found[key], parts[key]) and found[key].dtype == parts[key].dtype for key in parts)


def test_the_folder_of_its_run_will_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run/adapter")
    assert adapter_folder(tmp_path / "run") == tmp_path / "run/adapter"
    assert read_adapter(tmp_path / "run").path == tmp_path / "run/adapter"


def test_writing_replaces_what_was_there(folder: Path) -> None:
    (folder / "old").write_text("")
    write_adapter(folder, BASE, LAYERS, rows(), {"steps": 4})
    assert {path.name for path in folder.iterdir()} == {"adapter.json", "experts.safetensors"}
    assert read_adapter(folder).training == {"steps": 4}
    assert {path.name for path in folder.parent.iterdir()} == {"one"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        write_adapter(tmp_path / "one", BASE, LAYERS, rows())


def test_a_path_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_adapter(tmp_path / "file/one", BASE, LAYERS, rows())


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((folder / "adapter.json").read_text())
    edit(told)
    (folder / "adapter.json").write_text(json.dumps(told))


def layer(told: dict[str, Any]) -> dict[str, Any]:
    return told["layers"][FIRST]  # type: ignore[no-any-return]


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda told: told.update(format="other"), "the format in its adapter.json is 'other', not 'moesaic-esft'"),
    (lambda told: told.update(version=2), "it is of version 2 of the format, and this moesaic reads version 1"),
    (lambda told: told["base"].pop("fingerprint"), "says nothing usable of its base or layers"),
    (lambda told: told.update(layers=[]), "says nothing usable of its base or layers"),
    (lambda told: layer(told).pop("scores"), "says nothing usable of its base or layers"),
    (lambda told: layer(told).update(experts=[3, 1]), f"the expert ids of {FIRST} in adapter.json are not ascending"),
    (lambda told: layer(told).update(experts=[1, 1]), f"the expert ids of {FIRST} in adapter.json are not ascending"),
    (lambda told: layer(told).update(experts=[1, 2.5]), f"the expert ids of {FIRST} in adapter.json are not ascending"),
    (lambda told: layer(told).update(experts=[1, 4]), "are not in 0 ... 3"),
    (lambda told: layer(told).update(experts=[-1, 1]), "are not in 0 ... 3"),
    (lambda told: layer(told).update(experts=[], scores=[]), "are not in 0 ... 3"),
    (lambda told: layer(told).update(scores=[0.5]), "has 2 experts in adapter.json, but not a score for each"),
    (lambda told: layer(told).update(scores=[0.5, float("nan")]), "but not a score for each"),
    (lambda told: layer(told).update(experts=[1, 2]), "adapter.json has been changed"),
    (lambda told: layer(told).update(num_experts=5), "adapter.json has been changed"),
    (lambda told: told["base"].update(fingerprint="v1:01"), "adapter.json has been changed"),
    (lambda told: told["layers"].pop(SECOND), "adapter.json has been changed"),
]


@pytest.mark.parametrize(("edit", "reason"), CHANGES)
def test_a_changed_manifest_is_refused(edit: Callable[[dict[str, Any]], Any], reason: str, folder: Path) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    assert reason in str(caught.value)
    assert str(folder) in str(caught.value)


def test_scores_and_names_may_be_edited(folder: Path) -> None:
    change(folder, lambda told: (told["base"].update(name="mine"), layer(told).update(scores=[0.1, 0.2])))
    assert read_adapter(folder).layers[FIRST].scores == [0.1, 0.2]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"adapter"', "\xff", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(text: str, folder: Path) -> None:
    (folder / "adapter.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"adapter\.json"):
        read_adapter(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(size: int, folder: Path) -> None:
    path = folder / "experts.safetensors"
    os.truncate(path, path.stat().st_size + size if size < 0 else size)
    with pytest.raises(CheckpointError, match=r"experts\.safetensors is damaged or truncated"):
        read_adapter(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "experts.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"it holds no experts\.safetensors"):
        read_adapter(folder)


def test_a_file_that_goes_later_is_told(folder: Path) -> None:
    adapter = read_adapter(folder)
    (folder / "experts.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"experts\.safetensors cannot be read"):
        adapter.tensors(FIRST)


def test_the_file_of_another_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    layers = {FIRST: AdapterLayer([0, 2], [0.25, 0.5], 4), SECOND: LAYERS[SECOND]}
    other = write_adapter(tmp_path / "other", BASE, layers, rows())
    (other / "experts.safetensors").replace(folder / "experts.safetensors")
    with pytest.raises(CheckpointError, match=r"or experts\.safetensors belongs to another adapter"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda flat: flat.update({f"{FIRST}.up": torch.zeros(3, 6, 4)}), "must be floats of 2 experts"),
        (lambda flat: flat.update({f"{FIRST}.up": torch.zeros(2)}), "must be floats of 2 experts"),
        (lambda flat: flat.update({f"{FIRST}.up": torch.zeros(2, 6, 4, dtype=torch.int8)}), "must be floats"),
        (lambda flat: flat.update({"lm_head.weight": torch.zeros(2, 6)}), "of a layer that adapter.json does not list"),
        (lambda flat: [flat.pop(f"{SECOND}.{key}") for key in ("up", "up_bias")], f"holds nothing of {SECOND}"),
    ],
)
def test_tensors_that_do_not_suit_the_manifest_are_refused(edit: Any, reason: str, folder: Path) -> None:
    path = folder / "experts.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    flat = load_file(path)
    edit(flat)
    save_file(flat, path, metadata)
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    assert reason in str(caught.value)


def test_no_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter at"):
        read_adapter(tmp_path / "none")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no adapter: it has not finished"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapter_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="is an adapter in PEFT's format"):
        read_adapter(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(where=st.sampled_from(["", "base", "layers", "layer", "experts", "scores", "num_experts"]), value=json_values)
def test_no_manifest_breaks_the_reader(where: str, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("any") / "one", BASE, LAYERS, rows())
    told = json.loads((folder / "adapter.json").read_text())
    if where == "":
        told = value
    elif where == "layer":
        told["layers"][FIRST] = value
    elif where in ("experts", "scores", "num_experts"):
        told["layers"][FIRST][where] = value
    else:
        told[where] = value
    (folder / "adapter.json").write_text(json.dumps(told))
    with contextlib.suppress(CheckpointError):
        assert set(read_adapter(folder).layers) == {FIRST, SECOND}
