"""Preparing tokens, and the cache: what is done once, what is done again, and what never stays behind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moesaic.data import Count, TokenData, prepare, tokens, train_tokenizer
from moesaic.data.cache import BLOCK, MOST_BLOCKS, Cache
from moesaic.data.documents import Document
from moesaic.errors import CheckpointError, ConfigError, DataError

LONG_AGO = 1_600_000_000


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two small domains of several files each, last changed long ago."""
    for domain, line in (("code", "def f{n}(x):\n    return x + {n}\n"), ("prose", "Once there were {n} tales. ")):
        folder = tmp_path / domain
        folder.mkdir()
        for number in range(30):
            path = folder / f"{number}.txt"
            path.write_text(line.format(n=number) * 20)
            age(path)
    return [str(tmp_path / "code"), str(tmp_path / "prose")]


def age(path: Path) -> None:
    os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really done: "read" and "write", in order. Files of this test count as old enough to be relied on."""
    done: list[str] = []
    for name, label in (("read_corpus", "read"), ("_write", "write")):
        original = getattr(tokens, name)

        def record(*args: Any, original: Any = original, label: str = label) -> Any:
            done.append(label)
            return original(*args)

        monkeypatch.setattr(tokens, name, record)
    monkeypatch.setattr(tokens, "RACY_NS", -(10**18))
    return done


def small(sources: list[str], cache_dir: Path, **changes: Any) -> TokenData:
    return prepare(sources, **({"vocab_size": 300, "validation_fraction": 0.2, "cache_dir": cache_dir} | changes))


def ids(data: TokenData) -> dict[str, list[int]]:
    return {f"{side} {name}": a.tolist() for side in ("train", "validation") for name, a in getattr(data, side).items()}


def entries(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "tokens").iterdir())


def test_what_comes_out(sources: list[str], cache_dir: Path) -> None:
    data = small(sources, cache_dir)
    assert data.domains == ["code", "prose"]
    assert data.vocab_size == 300
    names = {}
    for side in ("train", "validation"):
        for domain, array in getattr(data, side).items():
            assert isinstance(array, np.memmap)
            assert array.dtype == np.uint16
            assert not array.flags.writeable
            texts = data.tokenizer.decode(array).split("<|endoftext|>")
            assert texts.pop() == ""
            names[side, domain] = texts
            count = data.counts[side][domain]
            assert count == Count(len(texts), sum(len(text.encode()) for text in texts), len(array))
    assert sorted(names["train", "code"] + names["validation", "code"]) == sorted(
        f"def f{n}(x):\n    return x + {n}\n" * 20 for n in range(30)
    )
    assert names["validation", "code"]
    assert names["validation", "prose"]


def test_a_second_start_neither_reads_nor_tokenizes(sources: list[str], cache_dir: Path, work: list[str]) -> None:
    first = small(sources, cache_dir)
    assert work == ["read", "write"]
    second = small(sources, cache_dir)
    assert work == ["read", "write"]
    assert ids(second) == ids(first)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert second.tokenizer.eos_token == "<|endoftext|>"
    assert (second.fingerprint, second.counts) == (first.fingerprint, first.counts)


def test_touched_files_are_read_but_not_tokenized_again(sources: list[str], cache_dir: Path, work: list[str]) -> None:
    first = small(sources, cache_dir)
    os.utime(Path(sources[0], "0.txt"), (LONG_AGO + 1, LONG_AGO + 1))
    assert small(sources, cache_dir).fingerprint == first.fingerprint
    assert work == ["read", "write", "read"]


def test_another_text_of_the_same_size_and_time_is_noticed(
    sources: list[str], cache_dir: Path, work: list[str]
) -> None:
    first = small(sources, cache_dir)
    path = Path(sources[0], "0.txt")
    path.write_text(path.read_text().replace("f0", "g0"))
    age(path)
    assert small(sources, cache_dir).fingerprint != first.fingerprint
    assert work == ["read", "write"] * 2


def test_files_written_a_moment_ago_are_read_again(sources: list[str], cache_dir: Path, work: list[str]) -> None:
    tokens.RACY_NS = 10**18  # undone by the fixture
    for _ in range(2):
        small(sources, cache_dir)
    assert work == ["read", "write", "read"]


def test_every_setting_counts(sources: list[str], cache_dir: Path, tmp_path: Path, work: list[str]) -> None:
    train_tokenizer([Document("d", "a", "Once there were tales. " * 9)], 280).save_pretrained(tmp_path / "bpe")
    variants: list[dict[str, Any]] = [
        {},
        {"vocab_size": 280},
        {"validation_fraction": 0.5},
        {"tokenizer": str(tmp_path / "bpe")},
    ]
    fingerprints = {small(sources, cache_dir, **changes).fingerprint for changes in variants}
    fingerprints.add(small(sources[:1], cache_dir).fingerprint)
    fingerprints.add(small([sources[0], f"tales={sources[1]}"], cache_dir).fingerprint)
    assert len(fingerprints) == 6
    assert work == ["read", "write"] * 6


def test_the_order_of_sources_does_not_change_the_tokens(sources: list[str], cache_dir: Path, work: list[str]) -> None:
    assert small(sources, cache_dir).fingerprint == small(sources[::-1], cache_dir).fingerprint
    assert work == ["read", "write", "read"]


def test_a_loaded_tokenizer(sources: list[str], cache_dir: Path, tmp_path: Path, work: list[str]) -> None:
    folder = tmp_path / "bpe"
    train_tokenizer([Document("d", "a", "Once there were tales. " * 9)], 280).save_pretrained(folder)
    for _ in range(2):
        data = small(sources, cache_dir, tokenizer=str(folder))
        assert data.tokenizer.name_or_path == str(folder)
        assert data.tokenizer.decode(data.train["prose"]).startswith("Once there were ")
    assert work == ["read", "write"]
    with pytest.raises(CheckpointError, match="no tokenizer"):
        small(sources, cache_dir, tokenizer=str(tmp_path / "nowhere"))


def test_large_vocabularies_take_four_bytes(sources: list[str], cache_dir: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Document("d", "a", "Once there were tales. " * 9)], 280)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {f"<extra {n}>": 280 + n for n in range(70_000)}
    larger = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>")
    larger.add_tokens(["tales"])
    larger.save_pretrained(tmp_path / "bpe")
    data = small(sources, cache_dir, tokenizer=str(tmp_path / "bpe"))
    assert data.train["prose"].dtype == np.uint32
    assert data.train["prose"].max() > 70_000
    assert "Once there were 7 tales." in data.tokenizer.decode(data.train["prose"]).replace("  ", " ")


def test_skipped_files_are_reported_on_every_start(sources: list[str], cache_dir: Path, work: list[str]) -> None:
    Path(sources[0], "bad.txt").write_bytes(b"\0")
    Path(sources[0], "copy.txt").write_text(Path(sources[0], "1.txt").read_text())
    for _ in range(2):
        data = small(sources, cache_dir)
        assert [(os.path.basename(s.path), s.count) for s in data.skipped] == [("bad.txt", 1)]
        assert data.duplicates == 1
    Path(sources[0], "bad.txt").unlink()  # the documents, and so the entry, stay the same
    assert small(sources, cache_dir).skipped == []
    assert work == ["read", "write", "read"]


def test_the_default_folder(sources: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(cache_dir))
    prepare(sources, vocab_size=257)
    assert len(entries(cache_dir)) == 1
    monkeypatch.delenv("MOESAIC_CACHE")
    monkeypatch.setenv("HOME", str(cache_dir / "home"))
    prepare(sources, vocab_size=257)
    assert len(entries(cache_dir / "home" / ".cache" / "moesaic")) == 1


def test_bad_settings_leave_nothing_behind(sources: list[str], cache_dir: Path) -> None:
    for changes in ({"vocab_size": 100}, {"validation_fraction": 1.0}):
        with pytest.raises(ConfigError):
            small(sources, cache_dir, **changes)
        assert entries(cache_dir) == []


# Damage


def damage_by_cutting(entry: Path) -> None:
    path = entry / "train-0.bin"
    path.write_bytes(path.read_bytes()[:-2])


def damage_one_bit(entry: Path) -> None:
    path = entry / "validation-2.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def damage_the_tokenizer(entry: Path) -> None:
    (entry / "tokenizer.json").write_text("{}")


def damage_by_losing_a_file(entry: Path) -> None:
    (entry / "train-1.bin").unlink()


def damage_the_listing(entry: Path) -> None:
    (entry / "entry.json").write_text((entry / "entry.json").read_text()[:-10])


def damage_a_word_of_the_listing(entry: Path) -> None:
    path = entry / "entry.json"
    path.write_text(path.read_text().replace('"domain": "code"', '"domain": "tome"'))


def damage_by_losing_everything(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_cutting,
        damage_one_bit,
        damage_the_tokenizer,
        damage_by_losing_a_file,
        damage_the_listing,
        damage_a_word_of_the_listing,
        damage_by_losing_everything,
    ],
)
def test_a_damaged_entry_is_made_anew(sources: list[str], cache_dir: Path, work: list[str], damage: Any) -> None:
    whole = ids(small(sources, cache_dir))
    (entry,) = entries(cache_dir)
    damage(entry)
    assert ids(small(sources, cache_dir)) == whole
    assert work == ["read", "write"] * 2
    assert entries(cache_dir) == [entry]
    assert ids(small(sources, cache_dir)) == whole
    assert work == ["read", "write"] * 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": "0", "skipped": [{"a": 1}], "duplicates": 0}'])
def test_a_damaged_note_only_costs_a_reading(
    sources: list[str], cache_dir: Path, work: list[str], content: str
) -> None:
    small(sources, cache_dir)
    (note,) = (cache_dir / "scans").iterdir()
    note.write_text(content)
    small(sources, cache_dir)
    assert work == ["read", "write", "read"]


def test_large_files_are_checked_in_places(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    size = (MOST_BLOCKS + 8) * BLOCK

    def write(folder: Path) -> dict[str, Any]:
        with (folder / "large.bin").open("wb") as file:
            file.truncate(size)
        return {}

    cache.build("k", write)
    path = cache.entry("k") / "large.bin"
    assert cache.open("k") == {}
    for place in (0, size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert cache.open("k") is None
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
        assert cache.open("k") == {}
    with path.open("ab") as file:
        file.write(b"\0")
    assert cache.open("k") is None


# A full disk


@contextlib.contextmanager
def disk_full_at(name: str, monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSPC) -> Iterator[None]:
    """Writing to a file with ``name`` in its name fails after its first bytes."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[:3])
            raise OSError(number, os.strerror(number))

    original = Path.open

    def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if name in path.name and "w" in mode:
            raw = Full(str(path), "wb")
            return raw if "b" in mode else io.TextIOWrapper(raw, write_through=True)
        return original(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        yield


@pytest.mark.parametrize("name", ["tokenizer.json", "train-0", "validation-3", "entry.json"])
def test_a_full_disk_is_said_and_leaves_nothing(
    sources: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with disk_full_at(name, monkeypatch), pytest.raises(DataError, match="no space left for the") as caught:
        small(sources, cache_dir)
    assert str(cache_dir) in str(caught.value)
    assert "MOESAIC_CACHE" in str(caught.value)
    assert entries(cache_dir) == []
    assert not (cache_dir / "scans").exists()
    assert small(sources, cache_dir).domains == ["code", "prose"]


@pytest.mark.usefixtures("work")
def test_a_disk_that_fills_at_the_very_end(
    sources: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk_full_at(".json.making", monkeypatch), pytest.raises(DataError, match="no space left"):
        small(sources, cache_dir)
    assert list((cache_dir / "scans").iterdir()) == []
    assert small(sources, cache_dir).domains == ["code", "prose"]


def test_a_disk_that_fills_while_it_is_flushed(
    sources: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="no space left"):
            small(sources, cache_dir)
    assert entries(cache_dir) == []


def test_other_trouble_is_said_too(sources: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_full_at("train", monkeypatch, errno.EIO), pytest.raises(DataError, match="Input/output error"):
        small(sources, cache_dir)
    cache_dir.rename(cache_dir.with_name("away"))
    cache_dir.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write the token cache in '.*cache': .*MOESAIC_CACHE"):
        small(sources, cache_dir)


# Many processes


def test_an_entry_that_another_process_made_meanwhile_is_used(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks: the second rename finds the place taken."""
    monkeypatch.setattr(Cache, "lock", lambda self, key: contextlib.nullcontext(False))
    cache = Cache(cache_dir)

    def write(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text("content")
        return {"by": "first"}

    def write_late(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text("content")
        assert Cache(cache_dir).build("k", write) == {"by": "first"}
        return {"by": "second"}

    cache.build("k", write_late)
    assert cache.open("k") == {"by": "first"}
    assert entries(cache_dir) == [cache.entry("k")]


# One interpreter imports the libraries once and forks: real processes, without an import for each.
MANY = """
    import os, signal, sys
    from moesaic.data import prepare, tokens

    sources, cache_dir = sys.argv[2:], sys.argv[1]
    original = tokens._write
    ready, start = os.pipe(), os.pipe()

    def say(*words):  # in one piece, however standard output is buffered
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    def run(write):
        tokens._write = write
        os.write(ready[1], b"r")
        os.read(start[0], 1)
        data = prepare(sources, vocab_size=300, validation_fraction=0.2, cache_dir=cache_dir)
        say("got", data.fingerprint, int(sum(a.sum() for a in data.train.values())))
        os._exit(0)

    def fork(count, write):
        children = []
        for _ in range(count):
            child = os.fork()
            if child == 0:
                run(write)
            children.append(child)
        for _ in range(count):
            os.read(ready[0], 1)
        os.write(start[1], b"s" * count)
        return children

    def wait(children):
        for child in children:
            assert os.waitpid(child, 0)[1] == 0

    def honest(*args):
        say("built")
        return original(*args)
"""
STARTED_AT_ONCE = (
    MANY
    + """
    wait(fork(4, honest))
"""
)
KILLED = (
    MANY
    + """
    def stuck(folder, *args):
        original(folder, *args)
        say("stuck")
        os.write(ready[1], b"w")
        signal.pause()

    (first,) = fork(1, stuck)
    os.read(ready[0], 1)  # the tokens are written, but not published
    others = fork(2, honest)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    wait(others)
"""
)


def run_script(script: str, cache_dir: Path, sources: list[str]) -> list[list[str]]:
    command = [sys.executable, "-c", textwrap.dedent(script), str(cache_dir), *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_four_processes_at_once_do_the_work_once(sources: list[str], cache_dir: Path) -> None:
    lines = run_script(STARTED_AT_ONCE, cache_dir, sources)
    assert [line[0] for line in lines].count("built") == 1
    got = [line for line in lines if line[0] == "got"]
    assert len(got) == 4
    data = small(sources, cache_dir)
    assert {tuple(line[1:]) for line in got} == {
        (data.fingerprint, str(sum(int(a.sum()) for a in data.train.values())))
    }
    assert len(entries(cache_dir)) == 1


def test_a_process_that_is_killed_while_it_builds_neither_blocks_nor_spoils(
    sources: list[str], cache_dir: Path
) -> None:
    lines = run_script(KILLED, cache_dir, sources)
    assert [line[0] for line in lines] == ["stuck", "built", "got", "got"]
    assert len(entries(cache_dir)) == 1  # what the killed one left is gone
    assert json.loads((entries(cache_dir)[0] / "entry.json").read_text())["about"]["dtype"] == "<u2"
