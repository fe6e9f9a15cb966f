"""The chooser: finds what is fastest at a bounded price, and every rank decides alike whatever its clocks say."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.parallel import harness
from tests.parallel.steps import COMPUTE, FAST, GIGABIT, topology, workload

from moesaic.autotune import use_tuning
from moesaic.errors import ConfigError, UnsupportedError, UsageError
from moesaic.parallel.choice import decisions
from moesaic.parallel.choice.chooser import Chooser
from moesaic.parallel.choice.cost import estimate
from moesaic.parallel.choice.signature import StepSignature
from moesaic.parallel.plan import Plan, Wish
from moesaic.parallel.workload import Workload

HOSTS = topology((0, 0, 1, 1))


@pytest.fixture(autouse=True)
def tuning() -> Iterator[None]:
    with use_tuning("on"):
        yield


Reality = Callable[[Plan, Workload], float]


def chooser(learn: bool = True) -> Chooser:
    return Chooser(GIGABIT, COMPUTE, HOSTS, learn)


def played(made: Chooser, steps: int, reality: Reality, step: Workload, wish: Wish | None = None) -> list[Any]:
    """(decision, seconds) of so many steps; each timing is told with the next step, as the counts exchange does."""
    told: list[Any] = []
    for _ in range(steps):
        if told:
            decision, seconds = told[-1]
            made.report(decision.number, [seconds / 3, seconds / 4] * 2, [seconds * 2 / 3, seconds / 2] * 2)
        decision = made.choose(step, wish)
        told.append((decision, reality(decision.plan, step)))
    return told


def off_by(**factors: float) -> Reality:
    """What the model says, times a factor by strategy, with disturbances that only ever lengthen."""
    disturbing = random.Random(0)

    def seconds(plan: Plan, step: Workload) -> float:
        predicted = estimate(plan, step, GIGABIT, COMPUTE, HOSTS).seconds
        disturbed = 1 + disturbing.expovariate(30) + (disturbing.random() < 0.05)
        return predicted * factors.get(plan.strategy, 1.0) * disturbed

    return seconds


def test_without_timings_the_model_chooses() -> None:
    step = workload(4, 8, 400, skew=2.0)
    decision = chooser().choose(step)
    assert decision.why == "predicted" and decision.number == 1
    fixed = [Plan("tokens"), Plan("weights", tuple(range(8))), Plan("hybrid", (0,)), Plan("tokens", overlap=4)]
    best = estimate(decision.plan, step, GIGABIT, COMPUTE, HOSTS).seconds
    assert all(best <= estimate(plan, step, GIGABIT, COMPUTE, HOSTS).seconds for plan in fixed)
    assert decision.estimates[0].seconds == pytest.approx(best)


@pytest.mark.parametrize("factors", [{"tokens": 1.6}, {"hybrid": 1.6}, {"weights": 0.5}, {}])
@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_what_is_fastest_is_found_at_a_bounded_price(factors: dict[str, float], skew: float) -> None:
    step, reality = workload(4, 8, 300, skew=skew), off_by(**factors)
    made = chooser()
    told = played(made, 200, reality, step)
    plain = {
        plan: estimate(plan, step, GIGABIT, COMPUTE, HOSTS).seconds * factors.get(plan.strategy, 1.0)
        for plan in {decision.plan for decision, _ in told}
    }
    best = min(plain.values())
    later = [plain[decision.plan] for decision, _ in told[100:] if decision.why == "measured"]
    assert len(later) > 90
    assert np.median(later) <= 1.03 * best
    lost = sum(plain[decision.plan] - best for decision, _ in told)
    assert lost <= 25 * best


def test_what_becomes_slow_is_given_up() -> None:
    step, made = workload(4, 8, 300, skew=1.5), chooser()
    first = played(made, 80, off_by(), step)[-1][0].plan
    later = [decision.plan for decision, _ in played(made, 80, off_by(**{first.strategy: 3.0}), step)]
    assert sum(plan.strategy == first.strategy for plan in later[40:]) < 5


def test_what_is_learned_of_one_kind_of_step_holds_for_others() -> None:
    made, other = chooser(), workload(4, 8, 2000)
    assert chooser().choose(other).plan.strategy == "tokens"
    predicted = {s: chooser(False).choose(other, Wish(s)).estimates[0].seconds for s in ("tokens", "weights")}
    # Near enough to be tried at a size nearby, far from the best in truth.
    reality = off_by(tokens=4 * predicted["weights"] / predicted["tokens"], hybrid=40.0)
    played(made, 60, reality, workload(4, 8, 1400), Wish("tokens"))
    played(made, 60, reality, workload(4, 8, 1400), Wish("weights"))
    assert made.choose(other).plan.strategy != "tokens"


def test_the_hot_experts_are_those_of_the_step_itself() -> None:
    made, step = chooser(learn=False), workload(4, 8, 400, skew=2.5)
    turned = replace(
        step,
        counts_WE=np.roll(step.counts_WE, 2, axis=1),
        rows_WB=np.roll(step.rows_WB, 1, axis=1),
    )
    wish = Wish("hybrid", overlap=1)
    one, other = made.choose(step, wish), made.choose(turned, wish)
    assert one.signature == other.signature and one.plan.fetched
    assert {(expert + 2) % 8 for expert in one.plan.fetched} == set(other.plan.fetched)


@pytest.mark.parametrize("off", ["learn", "tuning", "deterministic"])
def test_nothing_is_tried_where_nothing_may_be_learned(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: off == "deterministic")
    made = chooser(learn=off != "learn")
    with use_tuning("off" if off == "tuning" else "on"):
        told = played(made, 30, off_by(tokens=9.0), workload(4, 8, 400))
    assert {decision.plan for decision, _ in told} == {told[0][0].plan}
    assert {decision.why for decision, _ in told} == {"predicted"}


def test_wishes() -> None:
    made, step = chooser(), workload(4, 2, 100)
    decision = made.choose(step, Wish("tokens", overlap=2, exchange="direct", gather="direct", replicas=1))
    assert decision.plan == Plan("tokens", overlap=2, replicas=1) and decision.why == "fixed"
    for strategy in ("tokens", "weights", "hybrid"):
        assert made.choose(step, Wish(strategy)).plan.strategy == strategy
    assert made.choose(step, Wish(exchange="hierarchical")).plan.exchange == "hierarchical"
    with pytest.raises(ConfigError, match="replicas is 3"):
        made.choose(step, Wish("tokens", replicas=3))
    with pytest.raises(ConfigError, match="unknown exchange 'hierarchic'"):
        made.choose(step, Wish(exchange="hierarchic"))
    flat = Chooser(FAST, COMPUTE, topology((0, 0, 0, 0)))
    with pytest.raises(UnsupportedError, match="'hierarchical' cannot be used here: it needs several hosts"):
        flat.choose(step, Wish(exchange="hierarchical"))


def test_steps_of_no_tokens_at_all() -> None:
    for experts in (2, 8):
        decision = chooser().choose(workload(4, experts, 0))
        assert decision.estimates[0].seconds > 0


def test_signatures() -> None:
    step = workload(4, 8, 400, skew=1.0)
    one = StepSignature.of(step, Wish())
    assert one == StepSignature.of(workload(4, 8, 410, skew=1.0), Wish())
    larger = StepSignature.of(workload(4, 8, 800, skew=1.0), Wish())
    assert one.distance(larger) == 2  # half octaves
    assert one.distance(StepSignature.of(replace(step, grad=False), Wish())) is None
    assert str(one).startswith("768-1023 slots a rank, busiest rank 2x, hottest expert 2x, 4 ranks, E8 K2 D256 F512")
    assert str(StepSignature.of(step, Wish("tokens", overlap=2))).endswith("training, tokens, overlap 2 wished")


def test_decisions_are_recorded_replayed_and_explained() -> None:
    made, step = chooser(), workload(4, 8, 400, skew=2.0)
    with decisions.record() as log:
        played(made, 6, off_by(), step)
    assert len(log) == 6 and len({decision.plan for decision in log}) > 1
    with decisions.replay([decision.plan for decision in log]), decisions.record() as again:
        played(chooser(), 6, off_by(), step)
        with pytest.raises(UsageError, match="more steps than the 6 plans"):
            made.choose(step)
    assert [decision.plan for decision in again] == [decision.plan for decision in log]
    assert {decision.why for decision in again} == {"replayed"}
    line = str(log[0])
    assert "\n" not in line and line.startswith(f"{log[0].plan} [predicted]: ") and str(log[0].signature) in line
    (told,) = [decision for decision in decisions.explain() if decision in made.decisions()]
    assert told.signature == log[0].signature and told.why == "measured"


# Ranks that must agree.


def changing(number: int) -> Workload:
    """Workloads that come back now and then."""
    chance = random.Random(number % 17)
    return workload(
        3,
        chance.choice([2, 8]),
        chance.choice([0, 40, 300]),
        skew=chance.choice([0.0, 2.0]),
        grad=chance.random() < 0.5,
        seed=number % 17,
    )


def decided(seed: int, steps: int = 200) -> list[str]:
    """What a rank of its own mind about time, chance and order decides when it is fed as all others are."""
    random.seed(seed)
    wrong = random.Random(seed)
    with use_tuning("on"), pytest.MonkeyPatch.context() as patch:
        for clock in ("time", "perf_counter", "monotonic"):
            patch.setattr(time, clock, lambda: wrong.random() * 1e9)
        made, seconds, told = Chooser(GIGABIT, COMPUTE, topology((0, 0, 1))), random.Random(7), []
        for number in range(steps):
            decision = made.choose(changing(number))
            times = [[seconds.random() for _ in range(3)] for _ in range(2)]
            if number % 5:
                made.report(decision.number, times[0], times[1] if number % 7 else [0.0, 0.0, 0.0])
            told.append(f"{decision.plan} {decision.why} {made.checksum()}")
    return told


def test_choosers_that_are_fed_alike_decide_alike() -> None:
    told = harness.pool(3).run(decided, 1)
    assert told[0] == told[1] == told[2] == decided(2)
    assert len({line.rsplit(" ", 2)[0] for line in told[0]}) > 5


@pytest.mark.slow
def test_they_do_so_in_a_process_that_hashes_otherwise() -> None:
    code = "from tests.parallel.test_chooser import decided; print('\\n'.join(decided(3)))"
    environment = {**os.environ, "PYTHONHASHSEED": "99", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines() == decided(2)


def test_a_checksum_tells_who_was_fed_otherwise() -> None:
    one, other, step = chooser(), chooser(), workload(4, 8, 100)
    assert one.checksum() == other.checksum() < 1 << 63
    for made, seconds in ((one, 0.5), (other, 0.25)):
        made.report(made.choose(step).number, [seconds] * 4, [seconds] * 4)
    assert one.checksum() != other.checksum()
    assert Chooser(FAST, COMPUTE, HOSTS).checksum() != chooser().checksum()


def _disturbed(steps: int, seed: int, plans: Sequence[Plan] = ()) -> tuple[list[str], int, list[Plan]]:
    """Each rank waits where it likes, and the seconds that it measures and reports are made up."""
    import torch.distributed as dist

    chance, now = random.Random(f"{seed} {dist.get_rank()}"), 0.0

    def clock() -> float:
        nonlocal now
        now += 10 ** chance.uniform(-9, 3)
        return now

    replayed = decisions.replay(plans) if plans else nullcontext()
    with use_tuning("on"), pytest.MonkeyPatch.context() as patch, decisions.record() as log, replayed:
        patch.setattr(time, "perf_counter", clock)
        told, checksum = _disturbed_steps(steps, chance)
    return told, checksum, [decision.plan for decision in log]


def _disturbed_steps(steps: int, mine: random.Random) -> tuple[list[str], int]:
    """Real steps of a real layer, every rank disturbed at times of its own."""
    import torch.distributed as dist
    from tests.parallel import ranks as grid
    from tests.parallel.cases import Shape

    rank, size = dist.get_rank(), dist.get_world_size()
    shape = Shape(8)
    form = grid.form_of(shape)
    layout = grid.ExpertLayout(8, shape.d_ff, size)
    there = grid.topology((tuple(range(size)),))
    own = {
        name: grid.own_part(name, whole, form, layout, rank).clone().requires_grad_()
        for name, whole in shape.tensors().items()
    }
    made = Chooser(GIGABIT, COMPUTE, there)
    experts = grid.ParallelExperts(form, layout, there, made)
    alike, told = random.Random(0), []
    for _ in range(steps):
        tokens, hot, grad = alike.choice([1, 9, 60]), alike.random() < 0.5, alike.random() < 0.5
        x_TD = torch.randn(tokens + rank, shape.d_model)
        ids_TK = torch.zeros(tokens + rank, 2, dtype=torch.int64) if hot else torch.randint(0, 8, (tokens + rank, 2))
        ids_TK[:, 1] = (ids_TK[:, 0] + 1) % 8
        if mine.random() < 0.2:
            time.sleep(mine.random() / 200)
        with torch.set_grad_enabled(grad):
            y_TD = experts(x_TD, ids_TK, torch.ones(tokens + rank, 2), own)
        if grad:
            if mine.random() < 0.2:
                time.sleep(mine.random() / 200)
            y_TD.sum().backward()
        assert experts.last_decision is not None
        told.append(f"{experts.last_decision.plan} {experts.last_decision.why}")
    return told, made.checksum()


def test_real_ranks_agree_under_adversarial_timing() -> None:
    told = harness.pool(3).run(_disturbed, 200, 1)
    assert told[0] == told[1] == told[2]
    lines, _, plans = told[0]
    assert any(line.endswith("exploring") for line in lines)
    assert any(line.endswith("measured") for line in lines)
    # What was read can be replayed, whatever the ranks then wait for and measure.
    assert [str(plan) for plan in plans] == [line.rsplit(" ", 1)[0] for line in lines]
    for again, _, replayed in harness.pool(3).run(_disturbed, 60, 2, plans[:60]):
        assert again == [f"{plan} replayed" for plan in plans[:60]]
        assert replayed == plans[:60]
