"""Which plans are worth an estimate for a workload.

W ranks · E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

import moesaic.parallel.hierarchical  # noqa: F401  (it registers an exchange)
from moesaic.errors import UnsupportedError
from moesaic.parallel.choice.cost import PlanEstimate, Pricing
from moesaic.parallel.exchange import EXCHANGES
from moesaic.parallel.plan import AUTO, GATHERS, STRATEGIES, Plan, Wish
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray, Workload

_OVERLAPS = (1, 2, 4, 8)
# Larger hot sets are looked at until so many in a row were no better: the busiest rank has less to do only when some
# experts of each rank travel.
_PATIENCE = 3
# Ranks whose counts are looked at together.
_TOGETHER = 16


@dataclass(frozen=True)
class Candidate:
    """A rule that gives a plan for any workload of its kind; for other strategies than hybrid the same one each time.

    Attributes:
        hot: of a hybrid: how many experts' weights travel, those by which the most slots come to stay at home.
    """

    strategy: str
    hot: int = 0
    least: int = 1
    overlap: int = 1
    exchange: str = "direct"
    gather: str = "direct"
    replicas: int = 0

    def plan(self, workload: Workload, orders: dict[int, IntArray] | None = None) -> Plan:
        """The plan for one workload.

        Args:
            orders: keeps what hot sets of this workload follow from, by the least number of slots.
        """
        fetched: tuple[int, ...] = ()
        if self.strategy == "weights":
            fetched = tuple(range(workload.layout.num_experts))
        elif self.strategy == "hybrid":
            fetched = hottest(workload, self.hot, self.least, orders)
        return Plan(self.strategy, fetched, self.least, self.overlap, self.exchange, self.gather, self.replicas)

    @property
    def sort(self) -> tuple[str, bool, str, str]:
        """What candidates have in common whose predictions err alike."""
        return self.strategy, self.overlap > 1, self.exchange, self.gather


def hottest(workload: Workload, number: int, least: int, orders: dict[int, IntArray] | None = None) -> tuple[int, ...]:
    """The experts by which the most slots need not travel, if ranks with ``least`` slots for them fetch them."""
    orders = {} if orders is None else orders
    if least not in orders:
        layout, counts_WE = workload.layout, workload.counts_WE
        moved_E = _slots_from(counts_WE, least)
        if layout.slices == 1:  # what its owner has for it stays anyway
            stays_E = counts_WE[layout.block_of_expert, np.arange(layout.num_experts)]
            moved_E -= np.where(stays_E >= least, stays_E, 0)
        orders[least] = np.argsort(-moved_E, kind="stable")[: np.count_nonzero(moved_E)]
    return tuple(sorted(orders[least][:number].tolist()))


def _slots_from(counts_WE: IntArray, least: int) -> IntArray:
    """``[E]``: the slots of those ranks that have at least so many for an expert."""
    moved_E = np.zeros(counts_WE.shape[1], dtype=np.int64)
    for first in range(0, len(counts_WE), _TOGETHER):  # what is looked at together stays in the cache
        some_WE = counts_WE[first : first + _TOGETHER]
        moved_E += (some_WE * (some_WE >= least)).sum(0)
    return moved_E


def exchanges(topology: Topology, wish: Wish) -> tuple[str, ...]:
    """The exchanges that may be chosen.

    Raises:
        ConfigError: where an unknown one is wished for.
        UnsupportedError: where one is wished for that this topology does not allow.
    """
    if wish.exchange is None:
        return tuple(name for name in EXCHANGES if EXCHANGES.get(name).refusal(topology) is None)
    refusal = EXCHANGES.get(wish.exchange).refusal(topology)
    if refusal is not None:
        raise UnsupportedError(f"the exchange {wish.exchange!r} cannot be used here: {refusal}")
    return (wish.exchange,)


def search(pricing: Pricing, wish: Wish, names: tuple[str, ...]) -> list[tuple[Candidate, PlanEstimate]]:
    """Candidates with their estimates, the fastest first; equal ones in a fixed order.

    Args:
        names: exchanges that may be used, see :func:`exchanges`.

    Raises:
        ConfigError: where ``wish.replicas`` does not divide the number of slices.
    """
    found: dict[Candidate, PlanEstimate] = {}

    def price(candidate: Candidate) -> float:
        if candidate not in found:
            found[candidate] = pricing.estimate(candidate.plan(pricing.workload, pricing.orders))
        return found[candidate].seconds

    overlaps = _OVERLAPS if wish.overlap is None else (wish.overlap,)
    first = Candidate("", overlap=overlaps[0], exchange=names[0], gather=wish.gather or GATHERS[0])
    gathers = GATHERS if wish.gather is None else (wish.gather,)
    makers = {"tokens": _tokens, "weights": _weights, "hybrid": _hybrids}
    for strategy in STRATEGIES if wish.strategy == AUTO else (wish.strategy,):
        start = replace(first, strategy=strategy, replicas=wish.replicas or 0)
        bases = sorted(makers[strategy](start, pricing.workload, wish, price), key=price)
        # Whatever is best in its simplest form is thought to be best in the others, and one more in case it is not.
        for base in bases[:2]:
            gathered = [base] if strategy == "tokens" else [replace(base, gather=gather) for gather in gathers]
            base = min(gathered, key=price)
            if strategy == "weights" and pricing.workload.layout.slices == 1:
                continue  # no tokens travel
            for name in names:
                for overlap in overlaps:
                    price(replace(base, overlap=overlap, exchange=name))
    # One time is one way to carry out the step, however it is described: by another least number of slots, or as
    # relayed where nobody has anything to pass on.
    told: dict[tuple[object, ...], tuple[Candidate, PlanEstimate]] = {}
    for candidate, estimated in found.items():
        told.setdefault((replace(candidate, least=1, gather=GATHERS[0]), estimated.seconds), (candidate, estimated))
    return sorted(told.values(), key=lambda each: each[1].seconds)


Price = Callable[[Candidate], float]


def _tokens(start: Candidate, workload: Workload, wish: Wish, price: Price) -> Iterable[Candidate]:
    slices = workload.layout.slices
    if wish.replicas is not None or slices == 1:
        return [start]
    return [start, *(replace(start, replicas=degree) for degree in range(1, slices) if slices % degree == 0)]


def _weights(start: Candidate, workload: Workload, wish: Wish, price: Price) -> Iterable[Candidate]:
    return [start]


def _hybrids(start: Candidate, workload: Workload, wish: Wish, price: Price) -> Iterator[Candidate]:
    """Hot sets of 1, 2, 4, ... experts, while more of them help, for a few least numbers of slots."""
    for least in _leasts(workload):
        hot, best, worse = 1, math.inf, 0
        while hot == 1 or (hot < workload.layout.num_experts and worse < _PATIENCE):
            candidate = replace(start, hot=hot, least=least)
            seconds = price(candidate)
            yield candidate
            worse = 0 if seconds < best else worse + 1
            best, hot = min(best, seconds), 2 * hot


def _leasts(workload: Workload) -> list[int]:
    """From how many slots on a rank fetches an expert: as soon as it saves bytes, earlier, or with the first one.

    Earlier may be better, because it also takes work from the expert's owner.
    """
    # In training rows travel there and back twice, weights twice and their gradients once.
    weights = workload.expert_elements * workload.dtype.itemsize * (3 if workload.grad else 1)
    slot = (workload.row_bytes + workload.result_bytes) * (2 if workload.grad else 1)
    even = max(1, -(-weights // slot))
    most = int(workload.counts_WE.max())
    told: dict[int, int] = {}
    for least in (even, max(1, even // 4), 1):
        if least <= max(1, most):
            told.setdefault(int((workload.counts_WE >= least).sum()), least)
    return list(told.values())
