"""The cost model: how it orders the backends that are there, and where it puts those that it does not know."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.autotune.simulation import Machine, line

from moesaic.autotune.prior import costs
from moesaic.autotune.signature import Family
from moesaic.experts import BACKENDS, Backend
from moesaic.registry import Registry

FAMILY = Family("cpu", "bfloat16", "bfloat16", "plain", "swiglu", 64, 2048, 1024, 2048, 2, False)


def registry(**preferences: int) -> Registry[Backend]:
    machine = Machine()
    for name, preference in preferences.items():
        machine.add(name, line(1, 1, 1), preference)
    return machine.backends


def order(family: Family, rows: int, active: int, **preferences: int) -> list[str]:
    found = costs(family, registry(**preferences))
    return sorted(found, key=lambda name: found[name].seconds(rows, active))


OURS = {"native": 20, "grouped": 10, "loop": 0}


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize(("rows", "active"), [(8, 8), (512, 64), (32768, 64), (32768, 1)])
def test_the_compiled_kernels_come_first_on_a_cpu(stored: str, rows: int, active: int) -> None:
    assert order(replace(FAMILY, format=stored), rows, active, **OURS)[0] == "native"


def test_every_backend_of_ours_is_known_where_it_runs() -> None:
    known = costs(FAMILY, BACKENDS)
    assert set(known) == set(BACKENDS)
    gpu = replace(FAMILY, device="some card", threads=0)
    ours = order(gpu, 16, 8, triton=20, grouped=10, loop=0)
    assert ours[0] == "triton" and ours[-1] == "loop"


def test_work_costs_and_training_costs_more() -> None:
    cost = costs(FAMILY, BACKENDS)["native"]
    assert cost.seconds(8, 8) < cost.seconds(80, 8) < cost.seconds(80, 64)
    training = costs(replace(FAMILY, grad=True), BACKENDS)["native"]
    assert training.seconds(80, 64) == pytest.approx(3 * cost.seconds(80, 64))


@pytest.mark.parametrize(
    ("preference", "place"),
    [(100, ["mine", "native", "grouped"]), (15, ["native", "mine", "grouped"]), (-1, ["native", "grouped", "mine"])],
)
def test_one_that_the_model_does_not_know_is_placed_by_its_preference(preference: int, place: list[str]) -> None:
    assert order(FAMILY, 8, 8, native=20, grouped=10, mine=preference) == place


def test_where_none_is_known_all_are_alike() -> None:
    found = costs(FAMILY, registry(one=1, other=2))
    assert found["one"] == found["other"]
