"""The report folder: complete, replaced as a whole, and nobody else's files are touched."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from tests.inspect.traces import made_up_trace

from moesaic.errors import UsageError
from moesaic.inspect import RoutingTrace, check_out, report, write_report

FILES = {"index.html", "layers.png", "load.png", "preference.png", "report.json", "trace.npz", "transitions.png"}


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the folder: pictures take most of the time."""
    monkeypatch.setattr(report, "write_figures", lambda numbers, folder: (folder / "load.png").write_bytes(b"picture"))


def test_the_files(tmp_path: Path) -> None:
    trace = made_up_trace()
    returned = write_report(trace, tmp_path / "new" / "report")
    folder = tmp_path / "new" / "report"
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["report"]
    assert json.loads((folder / "report.json").read_text()) == returned
    assert set(returned["findings"][0]) == {"title", "text", "layer", "expert"}
    assert RoutingTrace.load(folder / "trace.npz").num_tokens == trace.num_tokens
    assert (folder / "index.html").read_text().startswith("<!doctype html>")
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    write_report(made_up_trace([(4, 1)], ["only"]), tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES - {"preference.png", "transitions.png"}


@pytest.mark.parametrize("adaptive", [False, True])
def test_spending_is_drawn_where_it_varies(tmp_path: Path, adaptive: bool) -> None:
    write_report(made_up_trace(null_share=0.4, adaptive=adaptive, numbers=[0, 0, 2]), tmp_path / "report")
    assert (tmp_path / "report" / "spending.png").is_file() == adaptive


@pytest.mark.parametrize("domains", [["a", "b"], ["a", "b", "c"]])
def test_pictures_of_any_shape(tmp_path: Path, domains: list[str]) -> None:
    write_report(
        made_up_trace([(8, 2), (3, 1)] * 2, domains, null_share=0.5, tokens_per_passage=8), tmp_path / "report"
    )
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES


def test_the_same_trace_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(made_up_trace(), tmp_path / name)
    for name in FILES - {"trace.npz"}:  # a zip file has times in it
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.usefixtures("one_picture")
def test_an_earlier_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_report(made_up_trace(), folder)
    (folder / "old.png").write_text("from an older version")
    write_report(made_up_trace([(4, 1)], ["only"]), folder)
    assert {path.name for path in folder.iterdir()} == {"index.html", "load.png", "report.json", "trace.npz"}
    assert json.loads((folder / "report.json").read_text())["layers"][0]["experts"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.usefixtures("one_picture")
def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    write_report(made_up_trace(), tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="it holds other files"):
        write_report(made_up_trace(), tmp_path)
    with pytest.raises(UsageError, match="that is a file"):
        check_out(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("one_picture")
def test_a_full_disk_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "report"
    write_report(made_up_trace(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_figures", full)
    with pytest.raises(UsageError, match=r"cannot write the report to .*: No space left on device"):
        write_report(made_up_trace(seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.usefixtures("one_picture")
def test_a_failed_swap_brings_the_earlier_report_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "report"
    write_report(made_up_trace(), folder)
    before = (folder / "index.html").read_bytes()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "report" and path.parent != tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        write_report(made_up_trace(seed=1), folder)
    assert (folder / "index.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
