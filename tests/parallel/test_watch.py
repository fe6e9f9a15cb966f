"""Ranks that die, stop, hang and fail: what the others say of them, and when."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.parallel.harness import PRELOAD, START

from moesaic.errors import ConfigError, TrainingError
from moesaic.parallel.liveness import suspects
from moesaic.parallel.liveness.suspects import Beat, Member, fallen, listed, suspected
from moesaic.parallel.liveness.watch import Watch, is_communication, one_line

TIMEOUT, INTERVAL = 3.0, 0.5
FOREVER = 240.0  # seconds; whoever waits so long has not been ended
BROKEN = 3 * INTERVAL + 1.0  # stated for a rank that dies
SILENT = TIMEOUT + 3 * INTERVAL  # stated for one that stops or does not come
SLACK = 8  # the machine of a test may be busy

Scenario = Callable[[Watch, int], None]


def exchange(watch: Watch, layer: str, name: str = "tokens exchange") -> None:
    with watch.collective(name, layer=layer):
        dist.all_to_all_single(torch.empty(6), torch.ones(6), async_op=True).wait()


def happens(number: signal.Signals) -> None:
    """A signal comes to this process, when the others know where it is."""
    time.sleep(2 * INTERVAL)
    Path("moment").write_text(str(time.monotonic()))
    os.kill(os.getpid(), number)


def killed_inside(watch: Watch, rank: int) -> None:
    exchange(watch, "mlp.0")
    if rank == 2:
        with watch.collective("gradients exchange", layer="mlp.0"):
            happens(signal.SIGKILL)
    exchange(watch, "mlp.0", "gradients exchange")


def killed_between(watch: Watch, rank: int) -> None:
    exchange(watch, "mlp.0")
    if rank == 2:
        happens(signal.SIGKILL)
    exchange(watch, "mlp.1")


def stopped(watch: Watch, rank: int) -> None:
    exchange(watch, "mlp.0")
    if rank == 2:
        happens(signal.SIGSTOP)
    exchange(watch, "mlp.1")


def busy(watch: Watch, rank: int) -> None:
    exchange(watch, "mlp.0")
    with watch.guard("step 12"):
        if rank == 2:
            Path("moment").write_text(str(time.monotonic()))
            while True:
                pass
        exchange(watch, "mlp.1")


def fails(watch: Watch, rank: int) -> None:
    with watch.guard("step 12"):
        exchange(watch, "mlp.0")
        if rank == 2:
            Path("moment").write_text(str(time.monotonic()))
            raise ValueError("no such\ntoken")
        exchange(watch, "mlp.1")


def leaves(watch: Watch, rank: int) -> None:
    exchange(watch, "mlp.0")
    if rank == 2:
        Path("moment").write_text(str(time.monotonic()))
        return
    exchange(watch, "mlp.1")


def host_killed(watch: Watch, rank: int) -> None:
    exchange(watch, "mlp.0")
    if rank == 0:
        happens(signal.SIGKILL)
    exchange(watch, "mlp.1")


def foreign_collective(watch: Watch, rank: int) -> None:
    """One that is not ours, as FSDP's in a step."""
    with watch.guard("step 12"):
        exchange(watch, "mlp.0")
        if rank == 2:
            happens(signal.SIGKILL)
        dist.all_reduce(torch.ones(1))


def waits_in_vain(watch: Watch, rank: int) -> None:
    """A backend that does not keep its timeout: nothing is raised in the main thread."""
    with watch.collective("tokens exchange", layer="mlp.0"):
        if rank == 2:
            happens(signal.SIGSTOP)
        threading.Event().wait(FOREVER)


def waits_elsewhere(watch: Watch, rank: int) -> None:
    """Rank 0 finds out, and rank 1, whose own timeout is far off, learns it from there."""
    if rank == 2:
        happens(signal.SIGKILL)
    with watch.collective("tokens exchange", layer="mlp.0"):
        if rank == 0:
            while not Path("moment").exists():
                time.sleep(0.01)
            raise RuntimeError("Connection closed by peer")
        threading.Event().wait(FOREVER)


def long_step(watch: Watch, rank: int) -> None:
    with Watch(timeout=2 * INTERVAL, interval=INTERVAL / 2) as strict, strict.guard("step 1"):
        threading.Event().wait(5 * INTERVAL)
        exchange(strict, "mlp.0")


def terminated_inside(watch: Watch, rank: int) -> None:
    """As torchrun does when a rank has died: the others are in a collective with it."""
    exchange(watch, "mlp.0")
    if rank == 2:
        happens(signal.SIGKILL)
    with watch.guard("step 12"):
        os.kill(os.getpid(), signal.SIGTERM)
        exchange(watch, "mlp.1")


def terminated_between(watch: Watch, rank: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminated_in_a_good_step(watch: Watch, rank: int) -> None:
    with watch.guard("step 1"):
        os.kill(os.getpid(), signal.SIGTERM)
        exchange(watch, "mlp.0")
        Path(f"done.{rank}").touch()


class Job:
    """Three ranks that do a scenario in a folder; none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[BaseProcess] = []

    def run(self, scenario: Scenario, left: list[int], *, agent: bool = True, remote: bool = False) -> dict[int, str]:
        """What each of the ranks ``left`` says at its end: the last line of its standard error.

        Before it, PyTorch itself may have reported a lost store.

        Args:
            agent: the store is with the parent, as it is with torchrun's agent; otherwise with rank 0.
            remote: the ranks do not see one another's processes, as on different hosts.
        """
        # One that a rank makes for itself takes a free port, which the others read from a file.
        store = dist.TCPStore("127.0.0.1", 0, 3, True, wait_for_workers=False) if agent else None
        if store is not None:
            (self.folder / "port").write_text(str(store.port))
        START.set_forkserver_preload(PRELOAD)
        for rank in range(3):
            process = START.Process(target=live, args=(scenario, rank, str(self.folder), agent, remote))
            self.processes.append(process)
            process.start()
        for rank in left:
            self.processes[rank].join(FOREVER)
        lines = {rank: (self.folder / f"{rank}.txt").read_text().splitlines() for rank in left}
        return {rank: said[-1] if said else "" for rank, said in lines.items()}

    def name(self, rank: int) -> str:
        return f"rank {rank} (host {Member.here(0).host}, pid {self.processes[rank].pid})"

    def seconds(self) -> float:
        """From the culprit's last act to the end of the last rank."""
        ends = [float(path.read_text()) for path in self.folder.glob("*.end")]
        return max(ends) - float((self.folder / "moment").read_text())

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def live(scenario: Scenario, rank: int, folder: str, agent: bool, remote: bool) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    log = os.open(f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(agent)
    if remote:
        suspects.Member.state = lambda self, home: ""  # type: ignore[method-assign]
    store = meet(rank, agent)
    store.add("here", 1)
    while store.add("here", 0) < 3:  # the group's own timeout is short
        time.sleep(0.01)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=limit)
    try:
        with Watch.of(interval=INTERVAL) as watch:
            scenario(watch, rank)
    except Exception as error:
        os.write(2, f"{one_line(error)}\n".encode())
    finally:
        Path(f"{rank}.end").write_text(str(time.monotonic()))


def meet(rank: int, agent: bool) -> dist.Store:
    port = Path("port")
    if rank == 0 and not agent:
        store = dist.TCPStore("127.0.0.1", 0, 3, True, wait_for_workers=False)
        Path("port.new").write_text(str(store.port))
        Path("port.new").rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), 3, False)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.close()


# Whether the others see the process of the one that falls: on one host they do.
where = pytest.mark.parametrize("remote", [False, True], ids=["same-host", "other-host"])


def assert_all_say(job: Job, told: dict[int, str], waited: str, *clauses: str) -> None:
    for rank, line in told.items():
        assert line.startswith(f"ParallelError: rank {rank} waited "), line
        assert f" s in {waited}: " in line
        assert [clause for clause in clauses if clause not in line] == [], line


class TestRanksThatFall:
    @pytest.mark.slow
    @where
    def test_killed_in_a_collective(self, job: Job, remote: bool) -> None:
        told = job.run(killed_inside, [0, 1], remote=remote)
        state = "has not answered for " if remote else "has died; "
        place = "it was last seen in the gradients exchange of layer mlp.0"
        assert_all_say(job, told, "the gradients exchange of layer mlp.0", f"{job.name(2)} {state}", place)
        assert job.seconds() < SLACK * BROKEN

    def test_killed_between_collectives(self, job: Job) -> None:
        told = job.run(killed_between, [0, 1])
        clause = f"{job.name(2)} has died; it was last seen after the tokens exchange of layer mlp.0"
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", clause)
        assert job.seconds() < SLACK * BROKEN

    @pytest.mark.slow
    @where
    def test_stopped(self, job: Job, remote: bool) -> None:
        told = job.run(stopped, [0, 1], remote=remote)
        state = "has not answered for " if remote else "is stopped and has not answered for "
        place = "it was last seen after the tokens exchange of layer mlp.0"
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", f"{job.name(2)} {state}", place)
        assert job.seconds() < SLACK * SILENT

    def test_busy_elsewhere(self, job: Job) -> None:
        told = job.run(busy, [0, 1])
        clause = (
            f"{job.name(2)} is alive but has not entered the tokens exchange of layer mlp.1: "
            "it was last seen in step 12, after the tokens exchange of layer mlp.0"
        )
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", clause)
        assert job.seconds() < SLACK * SILENT

    def test_an_error_of_its_own(self, job: Job) -> None:
        told = job.run(fails, [0, 1, 2])
        assert told.pop(2) == "ValueError: no such token"
        clause = f"{job.name(2)} ended with: ValueError: no such token"
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", clause)
        assert job.seconds() < SLACK * BROKEN

    def test_left_early(self, job: Job) -> None:
        told = job.run(leaves, [0, 1, 2])
        assert told.pop(2) == ""
        clause = f"{job.name(2)} has ended without an error, after the tokens exchange of layer mlp.0"
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", clause)

    @pytest.mark.slow
    @where
    def test_who_holds_the_store_is_killed(self, job: Job, remote: bool) -> None:
        told = job.run(host_killed, [1, 2], agent=False, remote=remote)
        clause = f"{job.name(0)} has died"
        if remote:
            clause = f"the job's store does not answer: {job.name(0)} holds it and has probably died"
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", clause)
        assert job.seconds() < SLACK * BROKEN

    @pytest.mark.slow
    def test_who_holds_the_store_and_ends_lets_the_others_read_why(self, job: Job) -> None:
        told = job.run(stopped, [0, 1], agent=False, remote=True)
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", f"{job.name(2)} has not answered for ")

    @pytest.mark.slow
    def test_a_collective_of_others_in_a_guarded_step(self, job: Job) -> None:
        told = job.run(foreign_collective, [0, 1])
        place = "in step 12, after the tokens exchange of layer mlp.0"
        assert_all_say(job, told, "step 12", f"{job.name(2)} has died; it was last seen {place}")


@pytest.mark.slow
class TestTheLastResort:
    def test_what_does_not_keep_its_timeout_is_ended(self, job: Job) -> None:
        told = job.run(waits_in_vain, [0, 1])
        for rank, text in told.items():
            assert text.startswith(f"moesaic: error: rank {rank} waited ")
            assert f" s in the tokens exchange of layer mlp.0: {job.name(2)} is stopped" in text
            assert job.processes[rank].exitcode == 1

    def test_who_waits_still_when_another_knows_is_ended(self, job: Job) -> None:
        told = job.run(waits_elsewhere, [0, 1])
        assert told[1].startswith("moesaic: error: rank 1 waited ")
        assert f": {job.name(2)} has died; it was last seen before its first collective (found by rank 0)" in told[1]
        assert [job.processes[rank].exitcode for rank in (0, 1)] == [0, 1]

    def test_a_long_step_among_living_ranks_is_not(self, job: Job) -> None:
        assert set(job.run(long_step, [0, 1, 2]).values()) == {""}


class TestTermination:
    def test_in_a_step_it_waits_for_what_the_step_comes_to(self, job: Job) -> None:
        told = job.run(terminated_inside, [0, 1])
        assert_all_say(job, told, "the tokens exchange of layer mlp.1", f"{job.name(2)} has died")

    @pytest.mark.slow
    def test_a_good_step_is_finished(self, job: Job) -> None:
        job.run(terminated_in_a_good_step, [0, 1, 2])
        assert {path.name for path in job.folder.glob("done.*")} == {"done.0", "done.1", "done.2"}
        assert [process.exitcode for process in job.processes] == [-signal.SIGTERM] * 3

    @pytest.mark.slow
    def test_between_it_acts_at_once(self, job: Job) -> None:
        job.run(terminated_between, [0, 1, 2])
        assert [process.exitcode for process in job.processes] == [-signal.SIGTERM] * 3


def start_without_rank_2(watch: Watch, rank: int) -> None:
    if rank < 2:
        Watch(timeout=4 * INTERVAL)


def finish(watch: Watch, rank: int) -> None:
    assert Watch.of() is watch
    assert Watch.of(dist.new_group([2, 1, 0])) is watch
    exchange(watch, "mlp.0")
    with pytest.raises(ConfigError, match=r"timeout is -1 s and interval 1.0 s: both must be above 0"):
        Watch(timeout=-1)
    with pytest.raises(RuntimeError, match=r"^out of paper$"), watch.collective("tokens exchange"):
        raise RuntimeError("out of paper")
    watch.close()
    watch.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "moesaic-watch"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert Watch.of() is not watch


class TestBeginningAndEnd:
    @pytest.mark.slow
    def test_a_rank_that_does_not_come(self, job: Job) -> None:
        told = job.run(start_without_rank_2, [0, 1, 2])
        for rank in (0, 1):
            assert told[rank] == f"ParallelError: rank {rank} waited 2.0 s for all ranks to start: rank 2 did not come"

    def test_nothing_goes_wrong(self, job: Job) -> None:
        assert set(job.run(finish, [0, 1, 2]).values()) == {""}
        assert [process.exitcode for process in job.processes] == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:53146"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("Timed out waiting 4000ms for send operation to complete"), True),
        (dist.DistBackendError("ncclUnhandledCudaError"), True),
        (dist.DistNetworkError("no route"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TrainingError("the connection of the dots failed"), False),
        (ConnectionError("connection refused"), False),
    ],
)
def test_what_is_an_error_of_communication(error: Exception, expected: bool) -> None:
    assert is_communication(error) is expected


ALL = [Member(rank, "a", 100 + rank, "", "") for rank in range(4)]


def beats(**changes: Beat) -> list[Beat]:
    """Rank 0 waits in its fifth collective and all others too, but for ``changes``: ``rank2=...``."""
    return [changes.get(f"rank{rank}", Beat(9.0, 5, True, "in the barrier")) for rank in range(4)]


class TestBlame:
    def test_silence_shows_at_the_final_look_only(self) -> None:
        before = [Beat(8.0 - rank / 2, 5, True, "in the barrier") for rank in range(4)]
        after = beats(rank3=before[3])
        assert fallen(ALL, before, after, 0, final=False) == []
        line = "rank 3 (host a, pid 103) has not answered for 2.5 s; it was last seen in the barrier"
        assert fallen(ALL, before, after, 0, final=True) == [line]

    def test_a_victim_is_not_the_culprit(self) -> None:
        before = beats(rank1=Beat(8.0, 5, False, "after it", "ParallelError: rank 0 ...", victim=True))
        after = beats(rank1=before[1], rank2=Beat(8.0, 4, False, "after it", "OSError: disk", ended=True))
        assert fallen(ALL, before, after, 0, final=False) == ["rank 2 (host a, pid 102) ended with: OSError: disk"]

    def test_the_latest_is_suspected_before_those_that_wait_for_it(self) -> None:
        after = beats(rank1=Beat(9.0, 4, True, "in the old one"), rank2=Beat(9.0, 3, False, "after step 1"))
        line = "is alive but has not entered the barrier: it was last seen after step 1"
        assert suspected(ALL, after, 0, "the barrier") == [f"rank 2 (host a, pid 102) {line}"]
        line = "is alive but has not entered the barrier: it is still in the old one"
        assert suspected(ALL, beats(rank1=after[1]), 0, "the barrier") == [f"rank 1 (host a, pid 101) {line}"]

    def test_next_who_has_ended_and_who_was_hit(self) -> None:
        left = Beat(7.0, 4, False, "after step 9", ended=True)
        hit = Beat(7.0, 4, False, "after step 9", "ParallelError: ...", victim=True, ended=True)
        line = "rank 1 (host a, pid 101) has ended without an error, after step 9"
        assert suspected(ALL, beats(rank1=left, rank2=hit), 0, "the barrier") == [line]
        assert suspected(ALL, beats(rank2=hit), 0, "the barrier") == [
            "rank 2 (host a, pid 102) ended with: ParallelError: ..."
        ]

    def test_nobody(self) -> None:
        places = ", ".join(f"rank {rank} in the barrier" for rank in range(4))
        assert suspected(ALL, beats(), 0, "the barrier") == [f"every rank answers: {places}"]

    def test_a_long_list_is_cut(self) -> None:
        assert listed([str(number) for number in range(9)]) == "0; 1; 2; 3; and 5 more"

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
    def test_a_process_that_took_the_number_of_another_is_not_taken_for_it(self) -> None:
        here = Member.here(0)
        assert here.state(here.home) == ""
        assert Member(0, here.host, here.pid, here.home, "another start").state(here.home) == "gone"
        assert Member(0, here.host, here.pid, here.home, "another start").state("another host") == ""


def test_a_long_error_is_one_short_line() -> None:
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line(ValueError("x" * 9999))) == 400
