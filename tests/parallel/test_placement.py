"""Affinity placement against enumeration of all placements, and its measures against tokens counted one by one."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from moesaic.errors import ConfigError, DataError, MissingDependencyError
from moesaic.parallel.placement import rows
from moesaic.parallel.placement.place import LayerRouting, Placement, place, traffic
from moesaic.parallel.placement.program import Layer, Problem, pair_bound, solve_exactly
from moesaic.parallel.placement.search import balanced, search


def random_routing(
    shape: Sequence[tuple[int, int]], *, tokens: int = 60, null: float = 0.0, groups: int = 1, seed: int = 0
) -> list[LayerRouting]:
    """Layers of (experts, slots a token); tokens of one kind go to like experts in each layer."""
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 4, tokens)
    layers = []
    for num_experts, top_k in shape:
        scores = random.normal(size=(4, num_experts))[kinds] * 2 + random.gumbel(size=(tokens, num_experts))
        ids = np.argsort(-scores, axis=1)[:, :top_k]
        ids[random.random(ids.shape) < null] = num_experts + int(random.integers(3))
        layers.append(LayerRouting(ids.astype(np.int64), num_experts, groups))
    return layers


def kept_by_counting(routing: Sequence[LayerRouting], rank_of: Sequence[Any]) -> float:
    """The mean over neighbouring layers of the transitions that stay: tokens and slots one by one."""
    means = []
    for here, there, ranks, next_ranks in zip(routing, routing[1:], rank_of, rank_of[1:], strict=False):
        stays = []
        for ids, next_ids in zip(here.expert_ids, there.expert_ids, strict=True):
            mine = [ranks[e] for e in ids if e < here.num_experts]
            later = [next_ranks[e] for e in next_ids if e < there.num_experts]
            if mine and later:
                stays.append(np.mean([a == b for a in mine for b in later]))
        means.append(np.mean(stays))
    return float(np.mean(means))


def sizes(num_experts: int, ranks: int) -> list[int]:
    """What each rank owns, by torch.chunk's rule."""
    each = -(-num_experts // ranks)
    return [max(0, min(each, num_experts - rank * each)) for rank in range(ranks)]


def all_placements(num_experts: int, ranks: int) -> Iterator[tuple[int, ...]]:
    owned = sizes(num_experts, ranks)
    for ranks_of in itertools.product(range(ranks), repeat=num_experts):
        if [ranks_of.count(rank) for rank in range(ranks)] == owned:
            yield ranks_of


def busiest(layer: LayerRouting, rank_of: Sequence[int], ranks: int) -> float:
    """The largest share of a rank of a layer's slots."""
    real = [e for e in layer.expert_ids.ravel() if e < layer.num_experts]
    return max(sum(rank_of[e] == rank for e in real) for rank in range(ranks)) / len(real)


def heaviest_first(layer: LayerRouting, ranks: int) -> float:
    """The load that spreading the experts by their load gives the busiest rank."""
    slots = [int((layer.expert_ids == e).sum()) for e in range(layer.num_experts)]
    room, loads = sizes(layer.num_experts, ranks), [0] * ranks
    for expert in sorted(range(layer.num_experts), key=lambda e: -slots[e]):
        rank = min((r for r in range(ranks) if room[r]), key=lambda r: loads[r])
        room[rank] -= 1
        loads[rank] += slots[expert]
    return max(loads) / sum(slots)


def best_by_enumeration(routing: Sequence[LayerRouting], ranks: int, max_imbalance: float) -> float:
    choices = []
    for layer in routing:
        limit = max(max_imbalance / ranks, heaviest_first(layer, ranks)) + 1e-9
        choices.append(
            [each for each in all_placements(layer.num_experts, ranks) if busiest(layer, each, ranks) <= limit]
        )
    # The best that ends in each placement of a layer, layer by layer: as good as trying every combination.
    best = dict.fromkeys(choices[0], 0.0)
    for level in range(1, len(routing)):
        pair = routing[level - 1 : level + 1]
        best = {
            now: max(value + kept_by_counting(pair, [before, now]) for before, value in best.items())
            for now in choices[level]
        }
    return max(best.values()) / (len(routing) - 1)


TINY = [
    ([(4, 1), (4, 1), (4, 1)], 2, 0.0, math.inf),
    ([(4, 2), (4, 2), (4, 2), (4, 2)], 2, 0.2, math.inf),
    ([(4, 2), (4, 2), (4, 2), (4, 2)], 2, 0.0, 1.05),
    ([(5, 2), (5, 2), (5, 1)], 2, 0.0, math.inf),
    ([(4, 2), (6, 3), (5, 2)], 2, 0.1, 1.1),
    ([(6, 2), (6, 2)], 3, 0.0, 1.2),
    ([(4, 2), (4, 2), (4, 1)], 4, 0.0, math.inf),
    ([(5, 2), (5, 2)], 4, 0.0, math.inf),
    ([(4, 1), (4, 2)], 1, 0.0, 1.2),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("shape", "ranks", "null", "limit"), TINY)
def test_the_placement_is_the_best_of_all(
    shape: list[tuple[int, int]], ranks: int, null: float, limit: float, seed: int
) -> None:
    routing = random_routing(shape, null=null, seed=seed)
    solution = place(routing, ranks, max_imbalance=limit)
    (stage,) = solution.stages
    best = best_by_enumeration(routing, ranks, limit)
    assert stage.value == pytest.approx(best, abs=1e-9)
    assert kept_by_counting(routing, solution.placement.rank_of) == pytest.approx(best, abs=1e-9)
    assert stage.is_optimal
    assert stage.gap < 1e-6


def problem_of(routing: Sequence[LayerRouting], ranks: int) -> Problem:
    """As the program sees it, made from counts of its own."""
    layers = []
    for layer in routing:
        load = np.array([(layer.expert_ids == e).mean() for e in range(layer.num_experts)])
        capacity = np.array([sizes(layer.num_experts, ranks)])
        layers.append(Layer(load, np.zeros(layer.num_experts, np.int64), capacity, np.full(ranks, np.inf)))
    pairs = []
    for here, there in itertools.pairwise(routing):
        weight = np.zeros((here.num_experts, there.num_experts))
        for ids, next_ids in zip(here.expert_ids, there.expert_ids, strict=True):
            for one, other in itertools.product(ids, next_ids):
                weight[one, other] += 1 / (len(ids) * len(next_ids) * len(here.expert_ids) * (len(routing) - 1))
        pairs.append(weight)
    return Problem(layers, pairs)


@pytest.mark.parametrize(("shape", "ranks"), [([(4, 1)] * 4, 2), ([(6, 2)] * 2, 3), ([(5, 2), (5, 2), (5, 2)], 2)])
def test_program_search_and_bound_by_themselves(shape: list[tuple[int, int]], ranks: int) -> None:
    routing = random_routing(shape, seed=3)
    problem = problem_of(routing, ranks)
    best = best_by_enumeration(routing, ranks, math.inf)
    exact = solve_exactly(problem, 60)
    assert exact.is_optimal
    assert exact.assignment is not None
    assert problem.kept(exact.assignment) == pytest.approx(best)
    assert exact.bound == pytest.approx(best)
    assert pair_bound(problem, deadline=-math.inf) >= pair_bound(problem) >= best - 1e-9
    start = [balanced(layer) for layer in problem.layers]
    found = search(problem, [start], 60)
    assert problem.kept(start) < problem.kept(found) <= best + 1e-9


def communities(num_experts: int, layers: int, ranks: int, *, top_k: int = 2, tokens: int = 400) -> list[LayerRouting]:
    """Every token keeps to the experts of one community, which are anywhere in a layer."""
    random = np.random.default_rng(7)
    of_token = random.integers(0, ranks, tokens)
    routing = []
    for _ in range(layers):
        members = random.permutation(num_experts).reshape(ranks, -1)
        chosen = random.permuted(np.tile(np.arange(members.shape[1]), (tokens, 1)), axis=1)[:, :top_k]
        routing.append(LayerRouting(members[of_token[:, None], chosen], num_experts))
    return routing


@pytest.mark.parametrize(("num_experts", "layers", "ranks"), [(16, 5, 4), (64, 8, 8)])
def test_communities_are_found_and_nothing_crosses(num_experts: int, layers: int, ranks: int) -> None:
    routing = communities(num_experts, layers, ranks)
    solution = place(routing, ranks, max_imbalance=math.inf)
    assert solution.stages[0].value == pytest.approx(1)
    assert solution.stages[0].is_optimal
    after = traffic(routing, solution.placement)
    assert all(layer.crossing in (None, 0) for layer in after)
    # All of a token's experts are on one rank, and it is there itself once in so many times.
    assert [layer.rows for layer in after] == pytest.approx([1 - 1 / ranks] * layers)
    assert after[0].rows < traffic(routing, Placement.contiguous(routing, ranks))[0].rows


def ranks_needed(layer: LayerRouting, rank_of: Sequence[int]) -> float:
    """The ranks that a token has experts on, token by token."""
    return float(np.mean([len({rank_of[e] for e in ids if e < layer.num_experts}) for ids in layer.expert_ids]))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("shape", "ranks", "null", "limit"), [*TINY, ([(6, 3)], 2, 0.1, 1.1), ([(6, 4)], 3, 0, 9)])
def test_by_rows_each_layer_is_the_best_of_all(
    shape: list[tuple[int, int]], ranks: int, null: float, limit: float, seed: int
) -> None:
    routing = random_routing(shape, null=null, seed=seed)
    solution = place(routing, ranks, max_imbalance=limit, objective="rows")
    best = []
    for layer, rank_of in zip(routing, solution.placement.rank_of, strict=True):
        most = max(limit / ranks, heaviest_first(layer, ranks)) + 1e-9
        allowed = [each for each in all_placements(layer.num_experts, ranks) if busiest(layer, each, ranks) <= most]
        best.append(min(ranks_needed(layer, each) for each in allowed))
        assert ranks_needed(layer, rank_of) == pytest.approx(best[-1])
        assert busiest(layer, rank_of, ranks) <= most
    (stage,) = solution.stages
    assert stage.value == pytest.approx(np.mean(best))
    assert stage.is_optimal


def test_the_search_by_rows_finds_the_best_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LARGEST_SETS", 0)
    for seed in range(4):
        (layer,) = routing = random_routing([(8, 3)], tokens=40, null=0.1, seed=seed)
        solution = place(routing, 2, max_imbalance=math.inf, objective="rows")
        best = min(ranks_needed(layer, each) for each in all_placements(8, 2))
        assert ranks_needed(layer, solution.placement.rank_of[0]) == pytest.approx(best)
        (stage,) = solution.stages
        assert stage.value == pytest.approx(best)
        assert stage.bound <= best
        assert not stage.exact


def test_by_rows_ranks_are_named_by_what_follows_what() -> None:
    """Communities that share no experts: each fills a rank, the same one in all layers."""
    routing = communities(32, 4, 4, top_k=4)
    after = traffic(routing, place(routing, 4, max_imbalance=math.inf, objective="rows").placement)
    assert [layer.rows for layer in after] == pytest.approx([3 / 4] * 4)
    assert all(layer.crossing in (None, 0) for layer in after)


def test_hosts_and_groups_by_rows() -> None:
    routing = random_routing([(16, 3)] * 2, tokens=200, groups=4, seed=2)
    solution = place(routing, 8, hosts=2, seconds=2, objective="rows")
    assert [stage.objective for stage in solution.stages] == ["rows"] * 3
    for level, rank_of in enumerate(solution.placement.rank_of):
        assert np.bincount(rank_of, minlength=8).tolist() == [2] * 8
        of_group = solution.placement.order(level).reshape(4, 4) // 4
        assert (of_group == of_group[:, :1]).all()
    after, before = (traffic(routing, each, 2) for each in (solution.placement, Placement.contiguous(routing, 8)))
    assert sum(layer.host_rows for layer in after) <= sum(layer.host_rows for layer in before)
    assert sum(layer.rows for layer in after) < sum(layer.rows for layer in before)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_traffic_is_what_tokens_counted_one_by_one_cost(hosts: int) -> None:
    routing = random_routing([(6, 2), (7, 3), (6, 1)], null=0.2, seed=5)
    ranks, random = 4, np.random.default_rng(0)
    rank_of = tuple(random.integers(0, ranks, layer.num_experts) for layer in routing)
    measured = traffic(routing, Placement(ranks, rank_of, (1, 1, 1)), hosts)
    host = np.arange(ranks) // (ranks // hosts)
    for level, (layer, own, told) in enumerate(zip(routing, rank_of, measured, strict=True)):
        rows = host_rows = 0
        for ids, home in itertools.product(layer.expert_ids, range(ranks)):
            there = {int(own[e]) for e in ids if e < layer.num_experts} - {home}
            rows += len(there)
            host_rows += sum(host[rank] != host[home] for rank in there)
        assert told.rows == pytest.approx(rows / ranks / len(layer.expert_ids))
        assert told.host_rows == pytest.approx(host_rows / ranks / len(layer.expert_ids))
        assert told.imbalance == pytest.approx(busiest(layer, own, ranks) * ranks)
        if level < 2:
            pair = slice(level, level + 2)
            assert told.crossing == pytest.approx(1 - kept_by_counting(routing[pair], rank_of[pair]))
            by_host = [host[each] for each in rank_of[pair]]
            assert told.host_crossing == pytest.approx(1 - kept_by_counting(routing[pair], by_host))
    assert measured[-1].crossing is None
    assert measured[-1].host_crossing is None


@pytest.mark.parametrize(
    ("num_experts", "ranks", "hosts"), [(12, 4, 1), (10, 4, 1), (10, 4, 2), (12, 8, 4), (16, 8, 2), (8, 8, 1)]
)
def test_every_rank_gets_what_it_owns(num_experts: int, ranks: int, hosts: int) -> None:
    routing = random_routing([(num_experts, 2)] * 3, tokens=300, seed=1)
    solution = place(routing, ranks, hosts=hosts, seconds=0.4)
    placement = solution.placement
    for level, rank_of in enumerate(placement.rank_of):
        assert np.bincount(rank_of, minlength=ranks).tolist() == sizes(num_experts, ranks)
        order = placement.order(level)
        assert sorted(order) == list(range(num_experts))
        # The contiguous split of the new order is the placement.
        assert rank_of[order].tolist() == np.repeat(np.arange(ranks), sizes(num_experts, ranks)).tolist()
    before, after = traffic(routing, Placement.contiguous(routing, ranks), hosts), traffic(routing, placement, hosts)
    measure = "crossing" if hosts == 1 else "host_crossing"
    assert sum(getattr(layer, measure) or 0 for layer in after) < sum(getattr(layer, measure) or 0 for layer in before)
    assert len(solution.stages) == (1 if hosts == 1 else 1 + hosts)
    assert all(0 <= stage.value <= stage.bound + 1e-12 for stage in solution.stages)


def test_hosts_come_first() -> None:
    """Fewer transitions between hosts than a placement that knows of none has; the best that there are."""
    routing = random_routing([(8, 2)] * 2, tokens=30, seed=2)
    staged = place(routing, 4, hosts=2, max_imbalance=math.inf)
    assert staged.stages[0].is_optimal
    host_crossing = np.mean([layer.host_crossing for layer in traffic(routing, staged.placement, 2)[:-1]])
    assert host_crossing == pytest.approx(1 - best_by_enumeration(routing, 2, math.inf))
    assert staged.stages[0].name == "experts on hosts"


@pytest.mark.parametrize(("groups", "ranks"), [(4, 2), (4, 4), (2, 4), (3, 4), (4, 8)])
def test_groups_stay_groups(groups: int, ranks: int) -> None:
    routing = random_routing([(24, 2)] * 3, tokens=300, groups=groups, seed=4)
    placement = place(routing, ranks, seconds=0.4).placement
    size = 24 // groups
    for level in range(3):
        order = placement.order(level)
        of_group = order.reshape(groups, size) // size
        assert (of_group == of_group[:, :1]).all()
        assert placement.rank_of[level][order].tolist() == np.repeat(np.arange(ranks), sizes(24, ranks)).tolist()
    after, before = (traffic(routing, each) for each in (placement, Placement.contiguous(routing, ranks)))
    assert sum(layer.crossing or 0 for layer in after) < sum(layer.crossing or 0 for layer in before)


def test_groups_against_all_placements_that_keep_them() -> None:
    """Two ranks, three groups of two: the middle one is torn apart, and its experts alone may change places."""
    routing = random_routing([(6, 1)] * 3, groups=3, seed=8)
    solution = place(routing, 2, max_imbalance=math.inf)
    choices = [(0, 0, one, 1 - one, 1, 1) for one in (0, 1)]
    best = max(kept_by_counting(routing, each) for each in itertools.product(choices, repeat=3))
    assert kept_by_counting(routing, solution.placement.rank_of) == pytest.approx(best)
    assert solution.stages[0].is_optimal


def test_no_rank_is_overloaded_where_that_is_possible() -> None:
    random = np.random.default_rng(0)
    # Two heavy communities that a placement by affinity alone would put on one rank each.
    weights = np.array([0.4, 0.4, 0.1, 0.1])
    of_token = random.choice(4, size=500, p=weights)
    routing = [LayerRouting((of_token * 4 + random.integers(0, 4, 500))[:, None], 16) for _ in range(4)]
    free = traffic(routing, place(routing, 4, max_imbalance=math.inf).placement)
    limited = traffic(routing, place(routing, 4, seconds=0.5).placement)
    assert all(layer.crossing in (None, 0) for layer in free)
    assert min(layer.imbalance for layer in free) > 1.4
    assert max(layer.imbalance for layer in limited) <= 1.2 + 1e-9


def test_one_heavy_expert_is_no_reason_to_give_up() -> None:
    """Where no placement is within the limit, spreading the others evenly around it sets the limit."""
    random = np.random.default_rng(0)
    ids = np.where(random.random((300, 3)) < 0.7, 0, random.integers(0, 8, (300, 3)))
    routing = [LayerRouting(ids[:, [level]], 8) for level in range(3)]
    placement = place(routing, 4).placement
    for layer, rank_of in zip(routing, placement.rank_of, strict=True):
        assert busiest(layer, rank_of, 4) <= heaviest_first(layer, 4) + 1e-9
        assert busiest(layer, rank_of, 4) > 0.7


def test_what_the_time_does_not_allow_is_said() -> None:
    routing = random_routing([(32, 4)] * 6, tokens=500, seed=6)
    solution = place(routing, 4, seconds=0.05)
    (stage,) = solution.stages
    assert not stage.is_optimal
    assert stage.gap > 0
    assert stage.bound == stage.value + stage.gap
    assert stage.value == pytest.approx(kept_by_counting(routing, solution.placement.rank_of))


def test_a_placement_does_not_hang_on_chance() -> None:
    routing = random_routing([(6, 2)] * 3, tokens=300, seed=9)
    one, other = (place(routing, 2).placement for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.rank_of, other.rank_of, strict=True))


SOME = random_routing([(4, 2)] * 2)


@pytest.mark.parametrize(
    ("routing", "settings", "error", "said"),
    [
        (SOME, {"ranks": 0}, ConfigError, "ranks is 0: it must be at least 1"),
        (SOME, {"ranks": 5}, ConfigError, "MoE layer 0 has 4 experts: ranks then own slices"),
        (SOME, {"ranks": 4, "hosts": 3}, ConfigError, "hosts is 3: it must be at least 1 and divide ranks = 4"),
        (SOME, {"ranks": 4, "hosts": 0}, ConfigError, "hosts is 0"),
        (SOME, {"ranks": 4, "seconds": 0.0}, ConfigError, "seconds is 0.0: it must be above 0"),
        (SOME, {"ranks": 4, "seconds": math.nan}, ConfigError, "seconds is nan"),
        (SOME, {"ranks": 4, "max_imbalance": 0.9}, ConfigError, "imbalance is 0.9: it must be at least 1"),
        (SOME, {"ranks": 4, "objective": "columns"}, ConfigError, "no such objective 'columns': .*rows, transitions"),
        (SOME[:1], {"ranks": 2}, DataError, "of 1 MoE layers"),
        ([LayerRouting(np.full((9, 2), 4), 4)] * 2, {"ranks": 2}, DataError, "no token of the routing has experts"),
    ],
)
def test_what_cannot_be_placed(
    routing: list[LayerRouting], settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        place(routing, **settings)


def test_without_scipy_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'moesaic\[place\]'"):
        place(SOME, 2)
