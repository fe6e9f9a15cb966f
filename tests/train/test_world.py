"""What ranks do together: shares, sums, work of the first one, errors of one told by all; on Gloo processes."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moesaic.errors import ConfigError, DataError, TrainingError
from moesaic.train.folder import RunFolder
from moesaic.train.optimizer import build_optimizer, clip, local_gradients
from moesaic.train.recipe import TrainSettings
from moesaic.train.signals import StopRequest
from moesaic.train.world import World, joined, launch, launched, own_device, portable

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def pools() -> Iterator[None]:
    with harness.pools_stopped_at_end():
        yield


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 5, 8])
def test_shares_are_contiguous_and_even(size: int, rows: int) -> None:
    parts = [list(range(rows))[World(rank, size).share(rows)] for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_a_world_of_its_own() -> None:
    with joined(CPU, 300) as world:
        assert (world.rank, world.size, world.hosts, world.is_first) == (0, 1, 1, True)
        assert world.sums([0.1, 2]) == [0.1, 2]
        assert world.first(lambda: "done") == world.in_turn(lambda: "done") == "done"
        assert not dist.is_initialized()


def together(folder: str) -> dict[str, Any]:
    """On each rank of a pool."""
    log = Path(folder) / "log"

    def note() -> int:
        with log.open("a") as file:
            file.write(f"{dist.get_rank()}\n")
        return dist.get_rank()

    def refuse() -> None:
        raise DataError("no data")

    def collapse() -> None:
        raise ZeroDivisionError("a defect")

    told: dict[str, Any] = {}
    with joined(CPU, 60) as world:
        told["sums"] = world.sums([world.rank, 1 / 3])
        told["first"] = world.first(note)
        told["in_turn"] = world.in_turn(note)
        for work in (refuse, collapse):
            try:
                world.first(work)
            except Exception as error:
                told[work.__name__] = (type(error).__name__, str(error))
        told["world"] = (world.rank, world.size, world.hosts)
    told["group is left"] = dist.is_initialized()
    return told


def test_ranks_agree_on_sums_results_and_errors(tmp_path: Path) -> None:
    ranks = harness.pool(3).run(together, str(tmp_path))
    assert [told["world"] for told in ranks] == [(rank, 3, 1) for rank in range(3)]
    assert all(told["sums"] == pytest.approx([3, 1]) for told in ranks)
    assert [told["first"] for told in ranks] == [0, 0, 0]
    assert [told["in_turn"] for told in ranks] == [0, 1, 2]
    written = (tmp_path / "log").read_text().split()
    assert written[:2] == ["0", "0"]  # the first one's own work, and its turn before the others'
    assert sorted(written[2:]) == ["1", "2"]
    assert [told["refuse"] for told in ranks] == [("DataError", "no data")] * 3
    assert [told["collapse"][0] for told in ranks] == ["ZeroDivisionError", "TrainingError", "TrainingError"]
    assert ranks[1]["collapse"][1] == "ZeroDivisionError: a defect"
    assert all(told["group is left"] for told in ranks)


def test_errors_travel_with_their_kind_and_message() -> None:
    assert isinstance(portable(ConfigError("wrong")), ConfigError)
    full = portable(OSError(28, "No space left on device"))
    assert isinstance(full, OSError)
    assert full.errno == 28
    assert str(portable(KeyError("x"))) == str(TrainingError("KeyError: 'x'"))


class Two(nn.Module):
    """Parameters that stand for FSDP's, on one mesh, and for slices of experts, on another one."""

    def __init__(self, is_sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.norm, self.slices = torch.randn(5, 3), torch.randn(3), torch.randn(2, 4)
        gradients = {name: torch.randn_like(getattr(self, name)) for name in ("weight", "norm", "slices")}
        if is_sharded:
            flat = init_device_mesh("cpu", (4,))
            grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("blocks", "slices"))
        for name, gradient in gradients.items():
            value = self.__dict__.pop(name)
            if is_sharded:
                mesh, cut = (grid, [Shard(0), Shard(1)]) if name == "slices" else (flat, [Shard(0)])
                value, gradient = (distribute_tensor(tensor, mesh, cut) for tensor in (value, gradient))
            parameter = nn.Parameter(value)
            parameter.grad = gradient
            self.register_parameter(name, parameter)


SETTINGS = TrainSettings(clip=0.5, weight_decay=0.3)


def clipped_on_meshes() -> dict[str, Any]:
    model = Two(is_sharded=True)
    optimizer = build_optimizer(model, SETTINGS)
    gradients = local_gradients(model.parameters())
    with joined(CPU, 60) as world:
        norm = math.sqrt(world.sums([float(get_total_norm(gradients)) ** 2])[0])
    clip(gradients, torch.tensor(norm), SETTINGS.clip)
    optimizer.step()
    meshes = [{parameter.device_mesh for parameter in group["params"]} for group in optimizer.param_groups]
    values = {name: tensor.full_tensor().tolist() for name, tensor in model.state_dict().items()}
    return {"norm": norm, "values": values, "meshes": [len(found) for found in meshes], "groups": len(meshes)}


def test_norm_clipping_and_steps_of_sharded_gradients_are_those_of_whole_ones() -> None:
    model = Two(is_sharded=False)
    optimizer = build_optimizer(model, SETTINGS)
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    clip_grads_with_norm_(model.parameters(), SETTINGS.clip, norm)
    optimizer.step()
    for told in harness.pool(4).run(clipped_on_meshes):
        assert told["norm"] == pytest.approx(float(norm), rel=1e-6)
        assert (told["groups"], told["meshes"]) == (3, [1, 1, 1])
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(torch.tensor(told["values"][name]), parameter.detach(), rtol=1e-6, atol=1e-6)


def test_the_own_clipping_is_that_of_torch() -> None:
    ours, theirs = Two(is_sharded=False), Two(is_sharded=False)
    norm = get_total_norm([parameter.grad for parameter in theirs.parameters() if parameter.grad is not None])
    clip_grads_with_norm_(theirs.parameters(), 0.5, norm)
    clip(local_gradients(ours.parameters()), norm, 0.5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)
    before = [gradient.clone() for gradient in local_gradients(ours.parameters())]
    clip(local_gradients(ours.parameters()), norm, 0.0)
    assert all(map(torch.equal, before, local_gradients(ours.parameters())))


def test_signals_of_any_rank_are_known_by_sums() -> None:
    with StopRequest() as one, StopRequest() as other:
        assert StopRequest.of_counts([a + b for a, b in zip(one.counts(), other.counts(), strict=True)]) is None
        signal.raise_signal(signal.SIGTERM)  # the inner one takes it
        total = [a + b for a, b in zip(one.counts(), other.counts(), strict=True)]
        assert StopRequest.of_counts(total) is signal.SIGTERM


def test_who_leaves_by_an_error_ignores_the_launcher() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="x"), StopRequest(others_may_end_us=True):
            raise ValueError("x")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_restart_knows_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    folder = RunFolder(tmp_path)
    assert launch() is None
    assert not folder.holds_run_of("abc")  # there is no run
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {}, "lives": [{"launch": "x"}, {"launch": "abc"}]}))
    assert folder.holds_run_of("abc")
    assert not folder.holds_run_of("x")
    assert not folder.holds_run_of(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert launch() == "abc"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says where it was given none
    assert launch() == launch()
    assert launch() not in (None, "none")


def test_a_folder_that_is_being_left_is_waited_for(tmp_path: Path) -> None:
    other = RunFolder(tmp_path)
    other.open(resume=False, overwrite=False)
    mine = RunFolder(tmp_path)
    mine.wait_until_free(0.0)  # in vain
    other.close()
    mine.wait_until_free(60.0)  # at once
    mine.check(resume=False, overwrite=False)


def test_a_rank_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, is_ours=False)
    folder.write(status="running")
    assert folder.note == {"status": "running"}
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launched() == 4
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert own_device(CPU) == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"more processes than GPUs on this machine \(2\)"):
        own_device(torch.device("cuda"))
