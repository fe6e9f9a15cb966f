"""The links: laws that are put in come out again, and real ranks agree on what they measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.parallel import harness
from tests.parallel.steps import topology

from moesaic.parallel.choice import links
from moesaic.parallel.choice.links import Link, Links
from moesaic.parallel.choice.network import measure_job
from moesaic.parallel.choice.volume import Flow, Places
from moesaic.parallel.groups import _Kept
from moesaic.parallel.topology import Topology

START, ALPHAS, BETAS, SHARED = 1e-4, (2e-5, 3e-4), (1e-10, 8e-9), (3e-10, 4e-9)


class Lawful(links._Measuring):
    """Exchanges that take what a law says, and no time."""

    def _exchange(self, group: Any, sends: Any, receives: Any, turns: int) -> tuple[float, float]:
        per_host, hosts = 3, 2
        messages = {"all": (per_host - 1, per_host), "inside": (per_host - 1, 0), "across": (0, hosts - 1)}[group]
        return START + messages[0] * ALPHAS[0] + messages[1] * ALPHAS[1], 0.0

    def _byte_seconds(self, bytes_WW: Any, small: float) -> float:
        class_ = int(bytes_WW[0, 3:].sum() > 0)
        sent_W = bytes_WW.sum(1)
        host = sent_W[:3].sum()
        return float(max(BETAS[class_] * sent_W.max(), SHARED[class_] * host) / sent_W.max())


def test_a_law_comes_out_again() -> None:
    there = topology((0, 0, 0, 1, 1, 1))
    there = Topology(0, 6, there.global_ranks, there.hosts, "cpu", "all", "inside", "across")
    found = Lawful(there).links()
    assert found.start == pytest.approx(START, rel=1e-3)
    for link, alpha, beta, shared in zip((found.inside, found.between), ALPHAS, BETAS, SHARED, strict=True):
        assert link.alpha == pytest.approx(alpha, rel=1e-3)
        # One rank alone: its own rate where that is the lower one. All of a host: what they share.
        assert link.beta == pytest.approx(max(beta, shared), rel=1e-3)
        assert link.shared == pytest.approx(shared, rel=1e-3)


def test_an_exchange_by_hand() -> None:
    made = Links(Link(1e-5, 1e-9), Link(1e-4, 4e-9, 3e-9), start=1e-3, cpu=1e-9, cpu_start=1e-6)
    places = Places.of((0, 0, 1, 1))
    flow = Flow(np.array([[9.0, 0, 0, 0], [5, 5, 0, 2]]), np.array([[0, 9.0, 0, 0], [2, 0, 5, 5]]), (1, 2))
    assert made.seconds(flow, 1e6, places) == pytest.approx(1e-3 + 1e-5 + 2e-4 + max(9 * 1e-3, 5 * 4e-3, 10 * 3e-3))
    assert made.work(flow, 1e6)[0] == pytest.approx(1e-6 + 16e6 * 1e-9)


def _measured() -> tuple[Links, Links]:
    _Kept.made.clear()
    told = measure_job()
    assert told.links is not None and (told.ranks, told.hosts, told.machines) == (3, 1, 1)
    assert told.has_inside and not told.has_between
    return told.links, links.measure(Topology.of(_mesh()))


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (3,))


def test_real_ranks_agree() -> None:
    told = harness.pool(3).run(_measured)
    assert told[0] == told[1] == told[2]
    for measured in told[0]:
        assert 0 < measured.inside.alpha < 1 and 0 < measured.inside.beta < 1e-6
        assert 0 < measured.inside.shared < 1e-6
        assert measured.cpu > 0


def test_alone_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert measure_job().links is None
    assert links.measure(topology((0,))) == Links(Link(0.0, 0.0), Link(0.0, 0.0))
