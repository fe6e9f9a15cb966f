"""The file of timings: shared by processes, ignored when it is not of this machine, and never in the way."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.autotune.simulation import E, Machine
from tests.autotune.test_tuner import MACHINES

from moesaic.autotune import memory as memory_module
from moesaic.autotune.memory import Memory
from moesaic.autotune.setting import use_tuning
from moesaic.autotune.signature import Family, Signature
from moesaic.autotune.timings import Timings

FAMILY = Family("cpu", "bfloat16", "bfloat16", "plain", "swiglu", 64, 2048, 1024, 2048, 2, False)
SIGNATURE = Signature(FAMILY, 12, 4, False)
ROOT = Path(__file__).resolve().parents[2]


def memory_in(folder: Path, **machine: Any) -> Memory:
    return Memory(folder, {"cpu": "a CPU", **machine}, lambda signature, backend: 2.0 if backend != "gone" else None)


def timed(ratio: float, count: int = 3, signature: Signature = SIGNATURE, backend: str = "native") -> Timings:
    timings = Timings()
    for _ in range(count):
        timings.of(signature, backend).note(ratio)
    return timings


def loaded(memory: Memory) -> dict[str, list[float]]:
    timings = Timings()
    memory.load(timings)
    return {backend: list(samples.ratios) for _, backend, samples in timings}


def test_what_one_process_timed_the_next_one_knows(tmp_path: Path) -> None:
    memory = memory_in(tmp_path / "new" / "folder")
    timings = timed(1.5, count=5)
    memory.save(timings)
    assert loaded(memory_in(tmp_path / "new" / "folder")) == {"native": [1.5, 1.5, 1.5]}
    assert memory.read() == {(SIGNATURE, "native"): (3.0, 5)}
    before = memory.file.stat().st_mtime_ns
    memory.save(timings)  # nothing is fresh
    assert memory.file.stat().st_mtime_ns == before


def test_too_few_timings_are_not_written(tmp_path: Path) -> None:
    memory = memory_in(tmp_path)
    memory.save(timed(1.5, count=2))
    assert not memory.file.exists()


def test_processes_add_to_one_another(tmp_path: Path) -> None:
    memory_in(tmp_path).save(timed(1.0, count=3))
    memory_in(tmp_path).save(timed(2.0, count=3))
    memory_in(tmp_path).save(timed(5.0, count=3, backend="grouped"))
    assert memory_in(tmp_path).read() == {(SIGNATURE, "native"): (3.0, 6), (SIGNATURE, "grouped"): (10.0, 3)}


def test_a_changed_machine_shows_in_spite_of_many_old_timings(tmp_path: Path) -> None:
    memory_in(tmp_path).save(timed(1.0, count=1_000_000 // 9))
    for _ in range(5):
        memory_in(tmp_path).save(timed(4.0, count=9))
    assert memory_in(tmp_path).read()[SIGNATURE, "native"][0] > 2 * 3.8


WRITER = """
import sys
from pathlib import Path
from tests.autotune.test_memory import SIGNATURE, FAMILY, memory_in, timed
from moesaic.autotune.signature import Signature
folder, number = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    memory = memory_in(folder)
    memory.save(timed(1.0, backend="native"), patience=60)
    own = Signature(FAMILY, 2 + 20 * number + turn, 1, False)
    memory.save(timed(1.0, signature=own, backend="grouped"), patience=60)
    assert memory.problem is None, memory.problem
"""


def test_several_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, str(number)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.communicate()
    entries = memory_in(tmp_path).read()
    assert entries.pop((SIGNATURE, "native")) == (2.0, 3 * 20 * 3)
    assert len(entries) == 3 * 20
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}


class TestWhatIsIgnored:
    @pytest.mark.parametrize("other", [{"cpu": "another CPU"}, {"torch": "9.9"}, {"moesaic": "0.0.1"}])
    def test_another_machine_or_version(self, tmp_path: Path, other: dict[str, str]) -> None:
        memory_in(tmp_path).save(timed(1.0))
        assert loaded(memory_in(tmp_path, **other)) == {}

    def test_another_format(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        memory_in(tmp_path).save(timed(1.0))
        monkeypatch.setattr(memory_module, "FORMAT", 99)
        assert loaded(memory_in(tmp_path)) == {}

    def test_a_file_that_another_machine_s_was_copied_over(self, tmp_path: Path) -> None:
        other = memory_in(tmp_path, cpu="another CPU")
        other.save(timed(1.0))
        memory = memory_in(tmp_path)
        other.file.rename(memory.file)
        assert loaded(memory) == {}
        assert memory.problem is not None and "it is not of this machine" in memory.problem

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"machine": 1}', b"[" * 100_000])
    def test_a_damaged_file_is_ignored_and_then_replaced(self, tmp_path: Path, content: bytes) -> None:
        memory = memory_in(tmp_path)
        memory.file.write_bytes(content)
        assert loaded(memory) == {}
        assert memory.problem is not None and str(memory.file) in memory.problem
        memory.save(timed(1.0))
        assert memory.problem is None
        assert loaded(memory_in(tmp_path)) == {"native": [1.0] * 3}

    @pytest.mark.parametrize(
        "damage",
        [
            lambda entry: entry.update(seconds=-1.0),
            lambda entry: entry.update(seconds="1"),
            lambda entry: entry.update(seconds=float("nan")),
            lambda entry: entry.update(count=0),
            lambda entry: entry.update(seconds=10**400),
            lambda entry: entry.update(count=10**400),
            lambda entry: entry["family"].update(d_model=10**400),
            lambda entry: entry["family"].update(d_model=-5),
            lambda entry: entry["family"].update(num_experts=0),
            lambda entry: entry["family"].update(threads=0),
            lambda entry: entry.update(rows=10**9),
            lambda entry: entry.update(rows=-3),
            lambda entry: entry.update(rows=True),
            lambda entry: entry.update(backend=7),
            lambda entry: entry.update(backend="gone"),
            lambda entry: entry.update(family=None),
            lambda entry: entry["family"].update(d_ff="wide"),
            lambda entry: entry["family"].pop("grad"),
            lambda entry: entry.clear(),
        ],
    )
    def test_damaged_entries_one_by_one(self, tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
        memory = memory_in(tmp_path)
        memory.save(timed(1.0, backend="grouped"))
        memory.save(timed(1.0))
        told = json.loads(memory.file.read_text())
        damage(told["timings"][0])
        told["timings"].append("an entry")
        memory.file.write_text(json.dumps(told))
        assert loaded(memory_in(tmp_path)) == {"native": [1.0] * 3}

    def test_timings_of_a_backend_that_is_not_here_stay_in_the_file(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, {"cpu": "a CPU"}, lambda signature, backend: 2.0)
        memory.save(timed(1.0, backend="gone"))
        memory_in(tmp_path).save(timed(1.0))
        assert {backend for _, backend in memory.read()} == {"gone", "native"}


class TestWhatCannotBeWritten:
    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "occupied").write_text("")
        memory = memory_in(tmp_path / "occupied")
        timings = timed(1.0)
        memory.save(timings)
        assert memory.problem is not None and memory.problem.startswith(f"cannot write {str(memory.file)!r}: ")
        (tmp_path / "occupied").unlink()
        memory.save(timings)  # what could not be written is not forgotten
        assert memory.problem is None
        assert loaded(memory) == {"native": [1.0] * 3}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_is_read_only(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        try:
            memory = memory_in(tmp_path)
            memory.save(timed(1.0))
            assert memory.problem is not None and "Permission denied" in memory.problem
        finally:
            tmp_path.chmod(0o700)

    def test_a_full_disk_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = memory_in(tmp_path)
        memory.save(timed(1.0))

        def full(*arguments: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        memory.save(timed(9.0))
        assert memory.problem is not None and "No space left on device" in memory.problem
        assert loaded(memory_in(tmp_path)) == {"native": [1.0] * 3}
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}

    def test_another_process_that_is_writing_is_not_waited_for(self, tmp_path: Path) -> None:
        memory = memory_in(tmp_path)
        timings = timed(1.0)
        with memory.file.with_suffix(".lock").open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            memory.save(timings, patience=0.0)
        assert not memory.file.exists()
        memory.save(timings, patience=0.0)
        assert memory.file.exists()

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*arguments: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", none)
        memory_in(tmp_path).save(timed(1.0))
        assert loaded(memory_in(tmp_path)) == {"native": [1.0] * 3}


class TestSize:
    def test_the_longest_untouched_entries_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory_module, "MOST_ENTRIES", 3)
        memory = memory_in(tmp_path)
        for number in (2, 4, 5, 2, 6):
            memory.save(timed(1.0, signature=Signature(FAMILY, number, 1, False)))
        assert [signature.rows for signature, _ in memory.read()] == [5, 2, 6]

    def test_files_of_other_machines_do_not_pile_up(self, tmp_path: Path) -> None:
        for number in range(30):
            memory = memory_in(tmp_path, torch=str(number))
            memory.save(timed(1.0))
            os.utime(memory.file, (number, number))
        files = list(tmp_path.glob("timings-*.json"))
        assert len(files) == len(list(tmp_path.glob("timings-*.lock"))) == 16
        assert memory.file in files

    def test_it_is_written_rarely(self, tmp_path: Path) -> None:
        now = 0.0
        memory = Memory(tmp_path, {}, lambda signature, backend: 2.0, clock=lambda: now)
        timings, writes = Timings(), 0
        for _ in range(10_000):
            now += 1.0
            timings.of(SIGNATURE, "native").note(1.0)
            before = memory.file.stat().st_mtime_ns if memory.file.exists() else 0
            memory.save_sometimes(timings)
            writes += memory.file.exists() and memory.file.stat().st_mtime_ns != before
        assert 1 <= writes <= 10
        assert memory.read()[SIGNATURE, "native"][1] > 5_000


class TestTheTuner:
    @pytest.fixture(autouse=True)
    def tuning(self) -> Any:
        with use_tuning("on"):
            yield

    def machine(self, folder: Path) -> Machine:
        machine = Machine()
        for (name, preference), truth in zip(
            [("native", 20), ("grouped", 10), ("loop", 0)], MACHINES["slow kernels"], strict=True
        ):
            machine.add(name, truth, preference)
        machine.remember(folder)
        return machine

    def test_what_a_process_learned_decides_the_first_call_of_the_next(self, tmp_path: Path) -> None:
        first = self.machine(tmp_path)
        assert first.call([64] * E).backend == "native"
        for _ in range(600):
            first.call([64] * E)
        assert first.settled([64] * E).backend == "grouped"
        first.tuner.save()
        choice = self.machine(tmp_path).call([64] * E)
        assert (choice.backend, choice.why) == ("grouped", "measured")

    def test_off_and_where_all_must_be_repeatable_it_is_not_even_read(self, tmp_path: Path) -> None:
        first = self.machine(tmp_path)
        for _ in range(600):
            first.call([64] * E)
        first.tuner.save()
        with use_tuning("off"):
            second = self.machine(tmp_path)
            assert second.call([64] * E).backend == "native"
            assert second.tuner.memory is None

    def test_a_folder_that_cannot_be_used_fails_no_call(self, tmp_path: Path) -> None:
        (tmp_path / "occupied").write_text("")
        machine = self.machine(tmp_path / "occupied")
        for _ in range(100):
            machine.call([64] * E)
        machine.tuner.save()
        told = machine.tuner.statistics()
        assert told.problem is not None and told.file is not None and "occupied" in told.file

    def test_the_child_of_a_fork_writes_only_its_own(self, tmp_path: Path) -> None:
        machine = self.machine(tmp_path)
        for _ in range(100):
            machine.call([64] * E)
        machine.tuner.start_anew()
        machine.tuner.save()
        assert not list(tmp_path.glob("*.json"))
