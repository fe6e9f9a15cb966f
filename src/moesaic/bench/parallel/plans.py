"""All the plans that could be fixed for a workload: what "auto" is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from moesaic.parallel.choice.candidates import Candidate
from moesaic.parallel.plan import GATHERS

OVERLAPS = (1, 2, 4)


def fixed_plans(num_experts: int, ranks: int, exchanges: tuple[str, ...]) -> dict[str, Candidate]:
    """Rules by name: every strategy with every overlap, exchange and gather that makes a difference to it.

    A hybrid fetches the hottest expert, the hottest eighth, or the hotter half. With two ranks an owner has one
    receiver, and nothing to relay.

    Args:
        exchanges: those that the topology allows.
    """
    gathers = GATHERS if ranks > 2 else GATHERS[:1]
    return {_name(each): each for each in _all(num_experts, exchanges, gathers)}


def _all(num_experts: int, exchanges: tuple[str, ...], gathers: tuple[str, ...]) -> Iterator[Candidate]:
    for overlap, exchange in product(OVERLAPS, exchanges):
        yield Candidate("tokens", overlap=overlap, exchange=exchange)
    for gather in gathers:
        yield Candidate("weights", gather=gather)
    hot_sets = dict.fromkeys((1, max(1, num_experts // 8), num_experts // 2))
    for hot, overlap, exchange, gather in product(hot_sets, OVERLAPS, exchanges, gathers):
        yield Candidate("hybrid", hot, overlap=overlap, exchange=exchange, gather=gather)


def _name(rule: Candidate) -> str:
    told = [rule.strategy]
    if rule.hot:
        told.append(f"{rule.hot} fetched")
    if rule.strategy != "weights":
        told += [f"overlap {rule.overlap}", rule.exchange]
    if rule.strategy != "tokens":
        told.append(f"gather {rule.gather}")
    return ", ".join(told)
