"""What kind of step it is: steps with the same signature are carried out alike.

Everything in it follows from whole numbers that all ranks have, by whole-number arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.autotune.signature import bucket_of_rows, lowest_rows
from moesaic.parallel.plan import AUTO, Wish
from moesaic.parallel.workload import Workload

# A ratio of 1 is as many sixteenths: half octaves have room below it.
_ONE = 16


@dataclass(frozen=True)
class StepSignature:
    """The kind of one step of one layer.

    Attributes:
        rows: bucket of the mean number of slots a rank, in half octaves.
        load: bucket of how many times the mean the rank with most work has, where tokens travel; in half octaves.
        hot: the same of the hottest expert against the mean expert.
        tokens: the same of the rank with most tokens.
        ranks, num_experts, d_model, d_ff, top_k, dtype, grad: of the layer and the step.
        wish: what the user fixed.
    """

    rows: int
    load: int
    hot: int
    tokens: int
    ranks: int
    num_experts: int
    d_model: int
    d_ff: int
    top_k: int
    dtype: str
    grad: bool
    wish: Wish

    @staticmethod
    def of(workload: Workload, wish: Wish) -> StepSignature:
        """The signature of a workload."""
        layout = workload.layout
        counts_E = workload.counts_WE.sum(0)
        load_B = np.bincount(layout.block_of_expert, weights=counts_E, minlength=layout.blocks)
        slots = int(counts_E.sum())
        return StepSignature(
            rows=bucket_of_rows(-(-slots // layout.ranks)),
            load=_ratio(int(load_B.max()) * layout.blocks, slots),
            hot=_ratio(int(counts_E.max()) * layout.num_experts, slots),
            tokens=_ratio(int(workload.tokens_W.max()) * layout.ranks, int(workload.tokens_W.sum())),
            ranks=layout.ranks,
            num_experts=layout.num_experts,
            d_model=workload.d_model,
            d_ff=layout.d_ff,
            top_k=workload.top_k,
            dtype=str(workload.dtype).removeprefix("torch."),
            grad=workload.grad,
            wish=wish,
        )

    def distance(self, other: StepSignature) -> int | None:
        """How many buckets lie between two kinds of steps of one layer; None where they are of different layers."""
        if self._layer() != other._layer():
            return None
        return abs(self.rows - other.rows) + abs(self.load - other.load) + abs(self.hot - other.hot)

    def _layer(self) -> tuple[object, ...]:
        return (
            *(self.ranks, self.num_experts, self.d_model, self.d_ff, self.top_k),
            *(self.dtype, self.grad),
        )

    def __str__(self) -> str:
        first, last = lowest_rows(self.rows), max(lowest_rows(self.rows), lowest_rows(self.rows + 1) - 1)
        slots = f"{first}-{last}" if last > first else str(first)
        wish = "" if self.wish == Wish() else f", {_told(self.wish)}"
        return (
            f"{slots} slots a rank, busiest rank {_times(self.load)}, hottest expert {_times(self.hot)}, "
            f"{self.ranks} ranks, E{self.num_experts} K{self.top_k} D{self.d_model} F{self.d_ff} {self.dtype}"
            f"{', training' if self.grad else ''}{wish}"
        )


def _ratio(part: int, whole: int) -> int:
    return bucket_of_rows(part * _ONE // whole) if whole else 0


def _times(bucket: int) -> str:
    return f"{lowest_rows(bucket) / _ONE:.2g}x"


def _told(wish: Wish) -> str:
    fixed = [
        ("overlap", wish.overlap),
        ("exchange", wish.exchange),
        ("gather", wish.gather),
        ("replicas", wish.replicas),
    ]
    words = [f"{name} {value}" for name, value in fixed if value is not None]
    return ", ".join(([] if wish.strategy == AUTO else [wish.strategy]) + words) + " wished"
