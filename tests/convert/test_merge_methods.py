"""Each merge method against its definition, a value at a time in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from moesaic.convert.merging import MERGES, MergeMethod, TaskVectors, magnitudes_at
from moesaic.convert.merging.method import create_merge, share_of
from moesaic.errors import ConfigError

BASE = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))


def tuned(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [BASE + 0.1 * torch.randn(7, 11, generator=generator) for _ in range(count)]


def vectors(models: list[torch.Tensor], rows: int, base: torch.Tensor = BASE) -> TaskVectors:
    return TaskVectors("w", tuple(base.shape), lambda r: base[r], [lambda r, m=m: m[r] for m in models], rows)


def run(
    name: str, models: list[torch.Tensor], weights: tuple[float, ...] | None = None, rows: int = 3, **options: Any
) -> torch.Tensor:
    method: MergeMethod = create_merge(name, options, len(models))
    weights = method.equal(len(models)) if weights is None else weights
    method.check_weights(weights, len(models))
    taken = vectors(models, rows)
    learned = method.learn(taken, weights, seed=0)
    return torch.cat([method.merge(piece, weights, learned) for piece in taken])


Flat = list[float]


def flat(tensor: torch.Tensor) -> Flat:
    return [float(value) for value in tensor.double().flatten()]


def deltas(models: list[torch.Tensor]) -> list[Flat]:
    return [[float(t) - float(b) for t, b in zip(m.flatten(), BASE.flatten(), strict=True)] for m in models]


def close(merged: torch.Tensor, wanted: Flat) -> None:
    assert flat(merged) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def trimmed(values: Flat, density: float) -> Flat:
    keep = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: math.ceil(density * len(values))]
    return [value if i in set(keep) else 0.0 for i, value in enumerate(values)]


def elected(columns: list[Flat], weights: tuple[float, ...]) -> Flat:
    out = []
    for values in zip(*columns, strict=True):
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if v * total > 0]
        whole = sum(w for w, _ in agree)
        out.append(sum(w * v for w, v in agree) / whole if whole else 0.0)
    return out


def added(columns: Flat, scale: float = 1.0) -> Flat:
    return [b + scale * d for b, d in zip(flat(BASE), columns, strict=True)]


def test_linear() -> None:
    models = tuned(3)
    mean = [sum(values) / 3 for values in zip(*map(flat, models), strict=True)]
    close(run("linear", models), mean)
    weighted = [(2 * a + 6 * c) / 8 for a, _, c in zip(*map(flat, models), strict=True)]
    close(run("linear", models, (2, 0, 6)), weighted)
    close(run("task_arithmetic", models), mean)  # with equal weights they are one


def test_an_average_keeps_the_mask_that_all_share() -> None:
    mask = torch.rand(7, 11) < 0.5
    base = BASE * mask
    merged = torch.cat(
        [
            create_merge("linear", {}, 2).merge(piece, (1, 1), None)
            for piece in vectors([m * mask for m in tuned(2)], 3, base)
        ]
    )
    assert torch.equal(merged != 0, mask)


def test_task_arithmetic_adds_and_takes_away() -> None:
    models = tuned(2)
    wanted = [0.7 * a - 0.2 * b for a, b in zip(*deltas(models), strict=True)]
    close(run("task_arithmetic", models, (0.7, -0.2), scale=0.5), added(wanted, 0.5))
    forgotten = run("task_arithmetic", models[:1], (-1.0,))
    assert torch.allclose(forgotten, 2 * BASE - models[0], atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_between_base_and_model(t: float) -> None:
    other = torch.randn(7, 11, generator=torch.Generator().manual_seed(9)) * 2
    a, b = flat(BASE), flat(other)
    na, nb = (math.sqrt(sum(x * x for x in v)) for v in (a, b))
    angle = math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / na / nb)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    close(run("slerp", [other], (t,) if t else (1e-9,)), [first * x + second * y for x, y in zip(a, b, strict=True)])


def test_slerp_between_two_task_vectors_keeps_their_length() -> None:
    one, two = tuned(2)
    two = BASE + (two - BASE) * ((one - BASE).norm() / (two - BASE).norm())
    merged = run("slerp", [one, two])
    assert float((merged - BASE).norm()) == pytest.approx(float((one - BASE).norm()), rel=1e-5)
    assert float((merged - one).norm()) == pytest.approx(float((merged - two).norm()), rel=1e-4)
    assert torch.allclose(run("slerp", [one, two], (0, 1)), two, atol=1e-6)


def test_slerp_of_parallel_ends_is_the_straight_line() -> None:
    assert torch.allclose(run("slerp", [BASE * 3]), BASE * 2, atol=1e-5)
    assert torch.allclose(run("slerp", [BASE]), BASE)
    assert torch.allclose(run("slerp", [BASE, BASE]), BASE)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3)])
def test_ties(density: float, weights: tuple[float, ...]) -> None:
    models = tuned(3)
    wanted = elected([trimmed(values, density) for values in deltas(models)], weights)
    close(run("ties", models, weights, density=density, scale=0.8), added(wanted, 0.8))


def test_ties_leaves_the_base_where_signs_cancel() -> None:
    base, step = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [1, 1, 2]])
    method = create_merge("ties", {"density": 1.0}, 2)
    taken = vectors([step, -torch.ones(2, 3)], 2, base)
    (merged,) = (method.merge(piece, (1, 1), method.learn(taken, (1, 1), 0)) for piece in taken)
    assert merged.tolist() == [[0, 0, 0], [0, 0, 2]]


def test_dare_keeps_a_share_and_its_mean() -> None:
    base = torch.zeros(300, 100)
    model = torch.randn(300, 100, generator=torch.Generator().manual_seed(3)) + 0.5
    method = create_merge("dare", {"density": 0.3}, 1)
    taken = vectors([model], 64, base)
    learned = method.learn(taken, (1.0,), seed=4)
    merged = torch.cat([method.merge(piece, (1.0,), learned) for piece in taken])
    stays = merged != 0
    assert float(stays.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(merged[stays], model[stays] / 0.3)
    assert float(merged.mean()) == pytest.approx(float(model.mean()), abs=0.03)
    again = torch.cat([method.merge(piece, (1.0,), learned) for piece in taken])
    other = torch.cat([method.merge(piece, (1.0,), method.learn(taken, (1.0,), seed=5)) for piece in taken])
    assert torch.equal(merged, again) and not torch.equal(merged, other)


def test_dare_drops_of_each_model_by_itself_and_then_adds_or_elects() -> None:
    models, weights = tuned(3), (0.5, 0.2, 0.3)
    method: Any = create_merge("dare", {"density": 0.4}, 3)
    taken = vectors(models, 3)
    draw = method.learn(taken, weights, seed=0)
    dropped = [torch.cat(parts) for parts in zip(*(method.dropped(piece, draw) for piece in taken), strict=True)]
    assert len({tuple(flat(each != 0)) for each in dropped}) == 3
    for each, values in zip(dropped, deltas(models), strict=True):
        for got, value in zip(flat(each), values, strict=True):
            assert got == 0 or got == pytest.approx(value / 0.4, rel=1e-4, abs=1e-6)
    columns = [flat(each) for each in dropped]
    summed = [sum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*columns, strict=True)]
    close(run("dare", models, weights, density=0.4, scale=1.5), added(summed, 1.5))
    close(run("dare_ties", models, weights, density=0.4), added(elected(columns, weights)))


@pytest.mark.parametrize(("density", "outliers"), [(0.3, 0.1), (0.9, 0.1), (0.5, 0.0), (0.2, 0.5)])
def test_breadcrumbs(density: float, outliers: float) -> None:
    models = tuned(2)
    columns = []
    for values in deltas(models):
        order = sorted(range(77), key=lambda i: -abs(values[i]))
        first = math.floor(outliers * 77)
        kept = set(order[first : first + math.ceil(density * 77)])
        columns.append([value if i in kept else 0.0 for i, value in enumerate(values)])
    wanted = [0.6 * a + 0.4 * b for a, b in zip(*columns, strict=True)]
    close(run("breadcrumbs", models, (0.6, 0.4), density=density, outliers=outliers), added(wanted))


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_consensus(tasks: int) -> None:
    models = tuned(3)
    wanted = []
    for values in zip(*deltas(models), strict=True):
        whole = sum(values)
        needed = sum(abs(v) > 0.4 * abs(whole - v) for v in values)
        wanted.append(whole / 3 if needed >= tasks else 0.0)
    close(run("consensus", models, tasks=tasks, scale=0.9), added(wanted, 0.9))


@pytest.mark.parametrize("name", [*MERGES])
def test_pieces_make_no_difference_and_no_change_stays_none(name: str) -> None:
    models = tuned(2)
    if not name.startswith("dare"):  # whose masks are drawn a piece at a time
        assert torch.allclose(run(name, models, rows=2), run(name, models, rows=7), atol=1e-6)
    assert torch.allclose(run(name, [BASE, BASE]), BASE)


ALL = {"ties": {"density": 1.0}, "dare": {"density": 1.0}, "dare_ties": {"density": 1.0}}
WHOLE: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    **ALL,
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
}


@pytest.mark.parametrize("name", WHOLE)
def test_one_model_of_which_nothing_is_left_out_is_that_model(name: str) -> None:
    (model,) = tuned(1)
    assert torch.allclose(run(name, [model], **WHOLE[name]), model, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3)])
def test_a_model_that_is_the_base_itself(density: float, weights: tuple[float, ...]) -> None:
    """Its task vector is 0: it has no say in TIES, and a share of the sum elsewhere."""
    models = [*tuned(2), BASE]
    columns = deltas(models)
    close(
        run("ties", models, weights, density=density), added(elected([trimmed(c, density) for c in columns], weights))
    )
    summed = [sum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*columns, strict=True)]
    close(run("task_arithmetic", models, weights), added(summed))
    close(run("linear", models, weights), added(summed, 1 / sum(weights)))
    needed = [sum(abs(v) > 0.4 * abs(sum(values) - v) for v in values) for values in zip(*columns, strict=True)]
    close(run("consensus", models, weights), added([s if n >= 2 else 0.0 for s, n in zip(summed, needed, strict=True)]))
    assert torch.allclose(run("slerp", models[1:], (1.0, 3.0)), BASE + (models[1] - BASE) / 4, atol=1e-6)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_of_opposite_ends_is_the_straight_line(t: float) -> None:
    """There is no one arc between them."""
    assert torch.allclose(run("slerp", [-BASE], (t,)), (1 - 2 * t) * BASE, atol=1e-6)
    (model,) = tuned(1)
    wanted = BASE + (1 - 2 * t) * (model - BASE)
    assert torch.allclose(run("slerp", [model, 2 * BASE - model], (1 - t, t)), wanted, atol=1e-6)


def test_opposite_task_vectors_leave_the_base() -> None:
    (model,) = tuned(1)
    for name in ("linear", "task_arithmetic", "breadcrumbs", "consensus"):
        assert torch.allclose(run(name, [model, 2 * BASE - model]), BASE, atol=1e-6), name


def test_breadcrumbs_keeps_changes_of_one_size() -> None:
    """As they are in bfloat16: 100 of 400 are a step up or down, of which 4 would be outliers and 36 stay."""
    base, model = torch.ones(20, 20), torch.ones(20, 20)
    model[:5, ::2], model[:5, 1::2] = 1 + 2**-7, 1 - 2**-7
    method = create_merge("breadcrumbs", {"density": 0.09, "outliers": 0.01}, 1)
    for outlier, wanted in ((False, model), (True, model.clone())):
        if outlier:  # more than one step: only these are masked
            model[0, :4], wanted[0, :4] = 1.5, 1.0
        taken = vectors([model], 7, base)
        learned = method.learn(taken, (1.0,), 0)
        assert torch.equal(torch.cat([method.merge(piece, (1.0,), learned) for piece in taken]), wanted)


@pytest.mark.parametrize("outliers", [0.0, 0.5, 1 - 1e-9])
def test_breadcrumbs_of_one_value(outliers: float) -> None:
    taken = vectors([torch.full((1, 1), 3.0)], 1, torch.ones(1, 1))
    method = create_merge("breadcrumbs", {"density": 1e-9, "outliers": outliers}, 1)
    (piece,) = taken
    assert method.merge(piece, (1.0,), method.learn(taken, (1.0,), 0)).tolist() == [[3.0]]


def test_a_share_is_counted_without_rounding_errors() -> None:
    assert 0.07 * 100 > 7 and share_of(0.07, 100) == 7
    assert [share_of(share, 10) for share in (1e-9, 0.01, 0.1, 0.11, 1.0)] == [1, 1, 1, 2, 10]


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_magnitudes_are_exact(rows: int) -> None:
    draw = random.Random(0)
    models = [torch.randn(40, 9) * 10 ** draw.uniform(-6, 3) for _ in range(3)]
    models[1][::2] = 0.25  # ties
    models[2][:] = 0.0
    base = torch.zeros(40, 9)
    ranks = [1, 2, 77, 180, 360]
    found = magnitudes_at(vectors(models, rows, base), ranks)
    for model, values in zip(models, found, strict=True):
        ordered = model.abs().flatten().sort(descending=True).values
        assert values == [float(ordered[rank - 1]) for rank in ranks]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tis", {}, "unknown merge method 'tis': did you mean 'ties'"),
        ("ties", {"densty": 0.1}, "merge method 'ties' has no option 'densty': did you mean 'density'"),
        ("ties", {"density": 0.0}, "density is 0.0: it must be above 0 and at most 1"),
        ("dare", {"density": 1.5}, "density is 1.5: it must be above 0 and at most 1"),
        ("breadcrumbs", {"density": 0.5, "outliers": 0.6}, "outliers is 0.6: it must be at least 0, and with density"),
        ("consensus", {"threshold": 0.0}, "threshold is 0.0: it must be above 0"),
        ("consensus", {"tasks": 0}, "tasks is 0: it must be at least 1"),
        ("linear", {"scale": 2.0}, "merge method 'linear' has no option 'scale'"),
        ("task_arithmetic", {"scale": "big"}, "option 'scale' of merge method 'task_arithmetic' is 'big'"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_merge(name, options, 2)


@pytest.mark.parametrize(
    ("name", "models", "message"),
    [("slerp", 3, "'slerp' takes 1 to 2 fine-tuned models beside their base, not 3"), ("consensus", 1, "2 or more")],
)
def test_the_number_of_models_is_checked(name: str, models: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_merge(name, {}, models)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("linear", (1.0,), "weights has 1 numbers for 2 models"),
        ("linear", (0.0, 0.0), "shares must be at least 0, and one of them above 0"),
        ("ties", (1.0, -1.0), "shares must be at least 0"),
        ("task_arithmetic", (1.0, math.nan), "all must be finite numbers"),
    ],
)
def test_weights_are_checked(name: str, weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_merge(name, {}, 2).check_weights(weights, 2)


def test_slerp_goes_no_further_than_its_end() -> None:
    with pytest.raises(ConfigError, match="between the base and one model it must be at most 1"):
        create_merge("slerp", {}, 1).check_weights((1.5,), 1)
