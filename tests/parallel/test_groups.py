"""The process groups of parallelized layers: as few as can be, with the timeout of the default one, of any ranks."""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness, layers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moesaic
from moesaic.errors import ParallelError
from moesaic.parallel.groups import timeout_of
from moesaic.parallel.sharding import forward_sharded

TIMEOUT = 8.0
FORGIVEN = 4.0  # seconds: the machine of a test may be busy


def test_models_over_the_same_ranks_share_their_groups() -> None:
    for before, after in harness.pool(4).run(opened):
        assert before == after


def opened() -> tuple[tuple[int, ...], ...]:
    """Open files, threads and process groups, when the first models are there, and when there have been more."""
    counts = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    for models in (1, 2):
        for _ in range(models):
            for settings in ({}, {"num_experts": 2}):
                for where in (None, mesh):
                    layer = moesaic.parallelize(layers.layer_of(settings), where)
                    layer(layers.features(dist.get_rank(), 3)[0]).sum().backward()
                    del layer
        gc.collect()
        groups: Any = dist.distributed_c10d._world.pg_map
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len(groups)))
    return tuple(counts)


def test_ranks_without_the_others(tmp_path: Path) -> None:
    """Two of three parallelize; the third one does nothing at all."""
    assert spawned(by_two, tmp_path, 3) == [True, True, True]


def by_two(rank: int) -> bool:
    if rank == 2:
        return True
    layer = layers.layer_of({})
    alone, x_TD = copy.deepcopy(layer), layers.features(rank, 5)[0]
    moesaic.parallelize(layer, DeviceMesh("cpu", [0, 1]))
    return torch.allclose(layer(x_TD), alone(x_TD), atol=1e-5)


def test_groups_of_some_ranks_before(tmp_path: Path) -> None:
    """Sliced experts, with a rank that has been in a group without the others; and without gradients."""
    assert spawned(after_a_group_of_one, tmp_path, 4) == [True] * 4


def after_a_group_of_one(rank: int) -> bool:
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    layer = layers.layer_of({"num_experts": 2})
    alone, x_TD = copy.deepcopy(layer), layers.features(rank, 5)[0]
    with torch.no_grad():
        moesaic.parallelize(layer)
        return torch.allclose(layer(x_TD), alone(x_TD), atol=1e-5)


def spawned(scenario: Callable[[int], Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What ranks of their own, in processes of their own, answer."""
    connections = [harness.START.Pipe() for _ in range(ranks)]
    processes = [
        harness.START.Process(target=_run, args=(scenario, folder, rank, ranks, connections[rank][1]))
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        return [ours.recv() if ours.poll(90) else None for ours, _ in connections]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(scenario: Callable[[int], Any], folder: Path, rank: int, ranks: int, connection: Any) -> None:
    torch.set_num_threads(1)
    try:
        _join(folder / "first", rank, ranks)
        connection.send(scenario(rank))
    except BaseException as error:
        connection.send(repr(error))
    time.sleep(FORGIVEN)  # who ends first must not be the cause of what the others see


def _join(folder: Path, rank: int, ranks: int) -> None:
    store = dist.FileStore(str(folder), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT))


def test_a_late_rank(tmp_path: Path) -> None:
    timeouts, seconds, error = spawned(late, tmp_path)[0]
    assert set(timeouts) == {TIMEOUT}
    assert seconds < TIMEOUT + 3 + FORGIVEN
    assert "rank 1" in error and "has not entered the counts exchange of layer experts" in error


def late(rank: int) -> Any:
    """The answer of rank 0, with experts that are sliced: they have groups of their own."""
    layer = moesaic.parallelize(layers.layer_of({"num_experts": 1, "top_k": 1}))
    timeouts = [timeout_of(group) for group in dist.distributed_c10d._world.pg_map]
    x_TD, _ = layers.features(rank, 3)
    ids_TK, weights_TK = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    forward_sharded(layer.experts, x_TD, ids_TK, weights_TK)
    if rank:
        time.sleep(TIMEOUT + 3 + FORGIVEN)
        return None
    started = time.monotonic()
    with pytest.raises(ParallelError) as failure:
        forward_sharded(layer.experts, x_TD, ids_TK, weights_TK)
    return timeouts, time.monotonic() - started, str(failure.value)


def test_a_second_life(tmp_path: Path) -> None:
    """After the default group has been destroyed and made anew, nothing of the first one is used."""
    assert spawned(lives_twice, tmp_path) == [[True, True]] * 2


def lives_twice(rank: int) -> list[bool]:
    answers = []
    store = dist.distributed_c10d._get_default_store()
    for life in range(2):
        for settings in ({}, {"num_experts": 1, "top_k": 1}):
            layer = layers.layer_of(settings)
            alone, x_TD = copy.deepcopy(layer), layers.features(rank, 5)[0]
            moesaic.parallelize(layer)
            good = torch.allclose(layer(x_TD), alone(x_TD), atol=1e-5)
        answers.append(good)
        if not life:
            dist.barrier()
            dist.destroy_process_group()
            again = dist.PrefixStore("again", store)
            limit = timedelta(seconds=TIMEOUT)
            dist.init_process_group("gloo", store=again, rank=rank, world_size=2, timeout=limit)
    return answers
