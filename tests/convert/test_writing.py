"""A model is written a shard at a time, complete or not at all, and an interrupted one goes on."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.convert.models import dense_folder
from torch import Tensor

from moesaic.convert import Output, open_source, write_model
from moesaic.convert.meter import Meter, metered, watch
from moesaic.convert.writing import check_output, partial_folder, partial_path
from moesaic.errors import CheckpointError, UsageError
from moesaic.hf.load import load_model

SETTINGS = {"method": "copy", "share": 0.5, "names": ["a", "b"]}


class Copy:
    """All tensors of a model as they are, noting which are made; fails at the one called ``fails``."""

    def __init__(self, path: Path, fails: str = "") -> None:
        self.source, self.fails = open_source(path), fails
        self.made: list[str] = []

    def outputs(self) -> list[Output]:
        shape, dtype = self.source.shape, self.source.dtype
        return [Output(name, shape(name), dtype(name), self.maker(name)) for name in self.source.names]

    def maker(self, name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if name == self.fails:
                raise KeyboardInterrupt
            self.made.append(name)
            return self.source.read(name)

        return make

    def write(self, out: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        config, tokenizer = self.source.config, self.source.tokenizer_from
        return write_model(
            self.outputs(), out, config=config, tokenizer_from=tokenizer, settings=settings or SETTINGS, **options
        )


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_folder(tmp_path / "dense")


@pytest.mark.parametrize("shard_bytes", [1, 10_000, 40_000, 2 << 30])
def test_what_is_written_is_what_was_made(dense: Path, tmp_path: Path, shard_bytes: int) -> None:
    (dense / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    said: list[str] = []
    written = Copy(dense).write(tmp_path / "new" / "out", shard_bytes=shard_bytes, say=said.append)
    before, (after, tokenizer) = load_model(dense)[0], load_model(tmp_path / "new" / "out")
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])
    assert len(said) == written.shards == len(list(written.folder.glob("*.safetensors")))
    assert written.parameters == sum(p.numel() for p in before.parameters()) == written.nbytes // 4
    assert after.generation_config.temperature == 0.5
    assert tokenizer.chat_template == "{{ messages }}"
    assert not partial_path(written.folder).exists()
    names = {path.name for path in written.folder.iterdir()}
    assert "work" not in names and ("model.safetensors.index.json" in names) == (written.shards > 1)
    largest = max(tensor.numel() * 4 for tensor in before.state_dict().values())
    for file in written.folder.glob("*.safetensors"):
        assert file.stat().st_size <= max(shard_bytes, largest) + 4096


def test_goes_on_after_the_last_whole_shard(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    last = Copy(dense).source.names[-1]
    first = Copy(dense, fails=last)
    with pytest.raises(KeyboardInterrupt):
        first.write(out, shard_bytes=20_000)
    assert not out.exists() and first.made
    second = Copy(dense)
    written = second.write(out, shard_bytes=20_000)
    assert 0 < written.resumed < written.shards
    assert last in second.made and len(second.made) < len(first.made)
    for name, tensor in load_model(dense)[0].state_dict().items():
        assert torch.equal(tensor, load_model(out)[0].state_dict()[name])


def test_shards_of_another_size_or_damaged_ones_are_made_again(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Copy(dense, fails=Copy(dense).source.names[-1]).write(out, shard_bytes=20_000)
    shards = sorted(partial_path(out).glob("model-*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-3])
    again = Copy(dense)
    written = again.write(out, shard_bytes=20_000)
    assert again.source.names[0] in again.made and written.resumed == len(shards) - 1
    with pytest.raises(KeyboardInterrupt):
        Copy(dense, fails=Copy(dense).source.names[-1]).write(tmp_path / "other", shard_bytes=20_000)
    written = Copy(dense).write(tmp_path / "other", shard_bytes=60_000)
    assert len(list(written.folder.glob("*.safetensors"))) == written.shards == 3
    load_model(written.folder)


def test_other_settings_are_refused(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Copy(dense, fails=Copy(dense).source.names[-1]).write(out)
    told = (
        r"holds an unfinished conversion with other settings \(share: 0.5 there, 0.25 now\): .* to begin anew, remove"
    )
    for ask in (lambda s: Copy(dense).write(out, s), lambda s: check_output(out, s)):
        with pytest.raises(CheckpointError, match=told):
            ask({**SETTINGS, "share": 0.25})
    with pytest.raises(CheckpointError, match=r"\(more: None there, 1 now\)"):
        check_output(out, {**SETTINGS, "more": 1})
    with pytest.raises(CheckpointError, match=r"\(method: 'copy' there, None now\)"):
        check_output(out, {name: value for name, value in SETTINGS.items() if name != "method"})
    check_output(out, SETTINGS)
    Copy(dense).write(out)
    with pytest.raises(CheckpointError, match="out' exists already"):
        check_output(out, SETTINGS)


def test_what_is_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial_path(out).mkdir()
    for name, content in (("mine", ""), ("conversion.json", "{"), ("conversion.json", "[1, 2]")):
        (partial_path(out) / name).write_text(content)
        with pytest.raises(CheckpointError, match=r"out.partial' is in the way, .* remove"):
            check_output(out, SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file' is not a folder that may be written to"):
        check_output(tmp_path / "file" / "out", SETTINGS)
    with pytest.raises(UsageError, match="out' cannot be written"), partial_folder(tmp_path / "file" / "out", SETTINGS):
        pass
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)  # who runs the tests may be allowed everything
        with pytest.raises(UsageError, match="shut' is not a folder that may be written to"):
            check_output(tmp_path / "shut" / "out", SETTINGS)


@pytest.mark.parametrize("left", [None, ".conversion.json.123"])
def test_a_kill_before_the_note_is_no_conversion(tmp_path: Path, dense: Path, left: str | None) -> None:
    out = tmp_path / "out"
    partial_path(out).mkdir()
    if left:
        (partial_path(out) / left).touch()
    check_output(out, SETTINGS)
    Copy(dense).write(out)
    assert json.loads((out / "conversion.json").read_bytes()) == SETTINGS
    assert not list(out.glob(".*"))


def test_work_goes_after_the_model_is_in_its_place(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with partial_folder(out, SETTINGS) as partial:
        (partial / "work").mkdir()
        (partial / "work" / "found").touch()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Copy(dense).write(out)
    assert (partial / "work" / "found").is_file()
    monkeypatch.undo()
    Copy(dense).write(out)
    assert not (out / "work").exists()


def test_an_interruption_while_work_goes_leaves_none_of_it(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, remove, tried = tmp_path / "out", shutil.rmtree, []

    def interrupted(*args: Any, **options: Any) -> None:
        tried.append(args)
        if len(tried) == 1:
            raise KeyboardInterrupt
        remove(*args, **options)

    with partial_folder(out, SETTINGS) as partial:
        (partial / "work").mkdir()
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Copy(dense).write(out)
    load_model(out)
    assert not (out / "work").exists()


def test_a_full_disk_is_told_in_one_line(dense: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.convert.writing.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(UsageError, match=r"out' cannot be written: .*full"):
            Copy(dense).write(tmp_path / "out")
    Copy(dense).write(tmp_path / "out")


def test_work_is_kept_until_the_end(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with partial_folder(out, SETTINGS) as partial:
            (partial / "work").mkdir(exist_ok=True)
            (partial / "work" / "found").write_text("kept")
    Copy(dense).write(out)
    assert not (out / "work").exists()


def test_a_wrong_shape_is_noticed(tmp_path: Path, dense: Path) -> None:
    wrong = [Output("x", (3, 2), torch.float32, lambda: torch.zeros(2, 3))]
    with pytest.raises(AssertionError, match=r"x was made as torch.float32 \[2, 3\], not torch.float32 \[3, 2\]"):
        write_model(wrong, tmp_path / "out", config=open_source(dense).config, tokenizer_from=None, settings=SETTINGS)


def test_the_meter_counts_storages_until_they_are_freed() -> None:
    watch(torch.zeros(100))  # nobody counts
    with metered() as meter:
        one = watch(torch.zeros(10))
        view = one.view(2, 5)[1]
        assert meter.alive == 40
        watch(view)
        del one
        assert meter.alive == 40
        other = watch(view.clone())
        assert meter.alive == 60
        del view
        assert (meter.alive, meter.peak) == (20, 60)
        with metered() as inner:
            watch(torch.zeros(1))
        assert (inner.peak, meter.peak) == (4, 60)
    del other
    assert (meter.alive, Meter().alive) == (0, 0)


def test_memory_is_a_shard_and_one_tensor(dense: Path, tmp_path: Path) -> None:
    sizes = [tensor.numel() * 4 for tensor in load_model(dense)[0].state_dict().values()]
    with metered() as meter:
        Copy(dense).write(tmp_path / "out", shard_bytes=10_000)
    assert 0 < meter.peak <= 10_000 + max(sizes)
    assert meter.alive == 0
