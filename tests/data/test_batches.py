"""Batches: a pure function of seed and step that goes through every window once an epoch."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import Batches, validation_windows
from moesaic.data.batches import PERIOD
from moesaic.errors import ConfigError, DataError


def numbered(count: int, first: int = 0) -> npt.NDArray[np.uint32]:
    """Tokens that say where they stand."""
    return np.arange(first, first + count, dtype=np.uint32)


def batches(tokens: dict[str, npt.NDArray[np.uint32]], **changes: object) -> Batches:
    chosen: dict[str, object] = {"sequence_length": 8, "batch_size": 4, "seed": 0}
    return Batches(tokens, **(chosen | changes))  # type: ignore[arg-type]


def test_shape_type_and_content() -> None:
    batch = batches({"a": numbered(1000)}).batch(3)
    assert batch.shape == (4, 9)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(9).expand(4, 9))


def test_a_step_gives_one_batch_whatever_was_asked_before() -> None:
    tokens = {"a": numbered(500), "b": numbered(300, 1000)}
    straight = batches(tokens)
    steps = [straight.batch(step) for step in range(50)]
    backwards = batches(dict(reversed(tokens.items())))
    for step in reversed(range(50)):
        assert torch.equal(backwards.batch(step), steps[step])
        assert backwards.domains(step) == straight.domains(step)
    assert not torch.equal(batches(tokens, seed=1).batch(0), steps[0])


def test_batches_are_the_same_for_ever() -> None:
    # Written down: a change would break the resuming of runs that began before it.
    source = batches({"a": numbered(500), "b": numbered(300, 1000)}, seed=17)
    digest = hashlib.sha256(b"".join(source.batch(step).numpy().tobytes() for step in (0, 1, 2000)))
    assert digest.hexdigest()[:16] == "d9e644eb9855ac89"


@given(st.integers(9, 400), st.integers(1, 8), st.integers(0, 2**40))
@settings(deadline=None)
def test_an_epoch_visits_every_window_once(count: int, length: int, seed: int) -> None:
    windows = (count - 1) // length
    source = batches({"a": numbered(count)}, sequence_length=length, batch_size=1, seed=seed)
    for epoch in range(2):
        starts = [int(source.batch(epoch * windows + n)[0, 0]) for n in range(windows)]
        offset = min(starts)
        assert sorted(starts) == [offset + n * length for n in range(windows)]
        assert offset + windows * length < count


def test_epochs_are_shuffled_anew() -> None:
    source = batches({"a": numbered(8 * 100 + 5)}, batch_size=100)
    orders = [tuple((source.batch(epoch)[:, 0] // 8).tolist()) for epoch in range(6)]
    offsets = {int(source.batch(epoch)[:, 0].min()) for epoch in range(6)}
    assert len(set(orders)) == 6
    assert tuple(sorted(orders[0])) not in orders
    assert len(offsets) > 1


def test_the_order_within_a_domain_does_not_depend_on_the_other_domains() -> None:
    def firsts(source: Batches) -> list[int]:
        rows = [(d, row) for s in range(40) for d, row in zip(source.domains(s), source.batch(s), strict=True)]
        return [int(row[0]) for domain, row in rows if domain == "a"]

    alone = firsts(batches({"a": numbered(400)}))
    shared = firsts(batches({"a": numbered(400), "b": numbered(400, 1000)}))
    assert len(shared) > 50
    assert alone[: len(shared)] == shared


def test_rows_and_domains_agree() -> None:
    source = batches({"a": numbered(500), "b": numbered(500, 1000)})
    for step in range(20):
        found = ["a" if row[0] < 1000 else "b" for row in source.batch(step)]
        assert found == source.domains(step)


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        (None, {"a": 0.75, "b": 0.25}),
        ({"a": 1, "b": 1}, {"a": 0.5, "b": 0.5}),
        ({"a": 30, "b": 90}, {"a": 0.25, "b": 0.75}),
        ({"b": 2.0}, {"b": 1.0}),
        ({"a": 1, "b": 0}, {"a": 1.0}),
    ],
)
def test_mixture(mixture: dict[str, float] | None, shares: dict[str, float]) -> None:
    source = batches({"a": numbered(3000), "b": numbered(1000, 5000)}, mixture=mixture, batch_size=16)
    assert source.mixture == pytest.approx(shares, abs=1 / PERIOD)
    rows = Counter(domain for step in range(PERIOD // 16) for domain in source.domains(step))
    assert {name: count / PERIOD for name, count in rows.items()} == source.mixture
    for step in range(50):  # and each batch is near to it
        count = Counter(source.domains(step))
        assert all(abs(count[name] - 16 * share) <= 4 for name, share in shares.items())


def test_a_rare_domain_still_takes_part() -> None:
    source = batches({"a": numbered(100), "b": numbered(100)}, mixture={"a": 1e9, "b": 1}, batch_size=PERIOD)
    assert Counter(source.domains(5)) == {"a": PERIOD - 1, "b": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"a": 1, "bb": 1}}, r"unknown domain 'bb' in the mixture: did you mean 'b'\? allowed: a, b"),
        ({"mixture": {"a": -1}}, r"share of domain 'a' in the mixture is -1"),
        ({"mixture": {"a": float("nan")}}, r"share of domain 'a' in the mixture is nan"),
        ({"mixture": {"a": 0}}, r"all shares of the mixture are 0"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"sequence_length": 0}, r"sequence_length is 0"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batches({"a": numbered(100), "b": numbered(100)}, **changes)


def test_too_few_tokens() -> None:
    with pytest.raises(DataError, match=r"domain 'b' has 8 tokens; one sequence of 8 needs 9"):
        batches({"a": numbered(100), "b": numbered(8)})
    assert batches({"a": numbered(100), "b": numbered(8)}, mixture={"a": 1}).mixture == {"a": 1.0}
    assert batches({"a": numbered(9)}).batch(100).shape == (4, 9)
    with pytest.raises(DataError, match="no tokens"):
        batches({})
    with pytest.raises(ConfigError, match="step is -1"):
        batches({"a": numbered(100)}).batch(-1)


def test_validation_windows_cover_everything_once_in_order() -> None:
    tokens = {"a": numbered(100), "b": numbered(30, 1000)}
    found = list(validation_windows(tokens, 8, batch_size=5))
    assert [(name, tuple(rows.shape)) for name, rows in found] == [
        ("a", (5, 9)),
        ("a", (5, 9)),
        ("a", (2, 9)),
        ("b", (3, 9)),
    ]
    predicted = torch.cat([rows[:, 1:].flatten() for name, rows in found if name == "a"])
    assert predicted.tolist() == list(range(1, 97))
    assert found[0][1].dtype == torch.int64


def test_a_limit_spreads_the_windows_over_the_domain() -> None:
    tokens = {"a": numbered(81), "b": numbered(17, 1000)}
    firsts = [int(row[0]) for _, rows in validation_windows(tokens, 8, limit=5) for row in rows]
    assert firsts == [0, 16, 32, 48, 64, 1000, 1008]


def test_validation_windows_complain_at_once() -> None:
    with pytest.raises(DataError, match=r"domain 'a' has 8 tokens; one sequence of 8 needs 9"):
        validation_windows({"a": numbered(8)}, 8)
    with pytest.raises(DataError, match="validation split is empty"):
        validation_windows({}, 8)
    with pytest.raises(ConfigError, match="limit is 0"):
        validation_windows({"a": numbered(80)}, 8, limit=0)
