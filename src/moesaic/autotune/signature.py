"""What kind of call it is: two calls with the same signature get the same backend.

Rows come in half octaves, the experts that have rows in powers of two. Both are known on the host before any work
starts: on a CPU from the counts, elsewhere from shapes alone, because reading a count would wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.dispatch import Dispatch
from moesaic.experts import ExpertWeights


@dataclass(frozen=True)
class Family:
    """All that a layer's calls on one device have in common.

    Attributes:
        device: ``"cpu"``, or an accelerator's model name: timings of one card say nothing about another.
        dtype: of the features, such as ``"bfloat16"``.
        format: how the weights are stored: that dtype too, or ``"int8"``, ``"int4"``.
        layout: of the weights in memory: ``"plain"`` where an output's weights stand together, ``"transposed"`` where
            an input's do.
        activation: a name of ``moesaic.experts.ACTIVATIONS``, or ``"custom"``.
        num_experts, d_model, d_ff, hidden: E (of the base, where adapters have more), D, F, and G, which is 2F for a
            gated activation.
        threads: that PyTorch uses on the CPU.
        grad: whether gradients will be asked for.
    """

    device: str
    dtype: str
    format: str
    layout: str
    activation: str
    num_experts: int
    d_model: int
    d_ff: int
    hidden: int
    threads: int
    grad: bool

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's forward; a multiply and an add count as two."""
        return 2 * self.d_model * (self.hidden + self.d_ff)

    @property
    def bytes_per_expert(self) -> float:
        """Bytes of one expert's two matrices, without scales and biases."""
        bits = {"int4": 4, "int8": 8, "float32": 32, "float64": 64}.get(self.format, 16)
        return self.d_model * (self.hidden + self.d_ff) * bits / 8

    def __str__(self) -> str:
        stored = "" if self.format == self.dtype else f" {self.format}"
        layout = "" if self.layout == "plain" else f" {self.layout}"
        shape = f"E{self.num_experts} D{self.d_model} F{self.d_ff} {self.activation}"
        threads = f" {self.threads} threads" if self.device == "cpu" else ""
        return f"{self.device} {self.dtype}{stored}{layout} {shape}{threads}{' grad' if self.grad else ''}"


@dataclass(frozen=True)
class Signature:
    """A family, and how much work the call is and how it is spread.

    Attributes:
        rows: bucket of the number of routed rows, see :func:`bucket_of_rows`.
        spread: bucket of the number of experts that have rows, which is its ``bit_length``: 1 for one expert, 2 for
            two and three, ...; 0 where the host does not know it.
        hot: whether one of several experts has more than half of all rows.
    """

    family: Family
    rows: int
    spread: int
    hot: bool

    def distance(self, other: Signature) -> int:
        """How many buckets lie between two signatures of one family."""
        return abs(self.rows - other.rows) + 2 * abs(self.spread - other.spread) + 2 * (self.hot != other.hot)

    def order(self) -> tuple[str, int, int, bool]:
        """A key to sort by: the family, then the size of the call."""
        return str(self.family), self.rows, self.spread, self.hot

    def typical_rows(self) -> int:
        """A number of rows inside the bucket."""
        return max(lowest_rows(self.rows), (lowest_rows(self.rows) + lowest_rows(self.rows + 1)) // 2)

    def typical_active(self) -> int:
        """A number of experts with rows inside the bucket."""
        if not self.spread:
            return min(self.family.num_experts, self.typical_rows())
        # With adapters more experts can have rows than the base has.
        most = max(self.family.num_experts, 1 << self.spread - 1)
        return min(most, ((1 << self.spread) + (1 << self.spread >> 1)) // 2)

    def __str__(self) -> str:
        first, last = lowest_rows(self.rows), lowest_rows(self.rows + 1) - 1
        text = f"{self.family} | {_range(first, max(first, last))} rows"
        if self.spread:
            fewest, most = 1 << self.spread - 1, (1 << self.spread) - 1
            text += f" on {_range(fewest, max(fewest, min(self.family.num_experts, most)))} experts"
        return f"{text}, one of them hot" if self.hot else text


def bucket_of_rows(rows: int) -> int:
    """Half octaves: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-23, ... rows are 2, 4, 5, 6, 7, 8, 9, 10, ...; none is 0."""
    length = rows.bit_length()
    return 2 * length + (rows >> length - 2 & 1) if length > 1 else 2 * length


def lowest_rows(bucket: int) -> int:
    """The fewest rows of a bucket."""
    length, half = bucket >> 1, bucket & 1
    if length < 2:
        return bucket - 1 if bucket > 1 else bucket  # bucket 3 is empty: 2 rows are the next
    return (1 << length - 1) + (half << length - 2)


def spread_of(counts: list[int], rows: int) -> tuple[int, int, bool]:
    """How many experts have rows, the bucket of that, and whether one of several is hot."""
    active = len(counts) - counts.count(0)
    return active, active.bit_length(), active > 1 and 2 * max(counts) > rows


def wants_grad(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> bool:
    """Whether a call is part of training.

    Features that require a gradient count in ``no_grad`` too: so does reentrant checkpointing compute the first time.
    """
    if x_TD.requires_grad or not torch.is_grad_enabled():
        return x_TD.requires_grad
    if weights.up.requires_grad or weights.down.requires_grad or dispatch.weights.requires_grad:
        return True
    biases = (weights.up_bias, weights.down_bias)
    return biases != (None, None) and any(bias is not None and bias.requires_grad for bias in biases)


def family_of(x_TD: Tensor, weights: ExpertWeights, grad: bool) -> Family:
    """The family of a call."""
    device = x_TD.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype = str(x_TD.dtype).removeprefix("torch.")
    return Family(
        device=name,
        dtype=dtype,
        format=dtype if weights.format is None else weights.format.name,
        # By the memory, not by the shape: freezing changes the one and keeps the other.
        layout="plain" if weights.up.stride(-2 if weights.transposed else -1) == 1 else "transposed",
        activation=weights.activation.name,
        num_experts=weights.base_experts or weights.num_experts,
        d_model=weights.d_model,
        d_ff=weights.d_ff,
        hidden=2 * weights.d_ff if weights.activation.gated else weights.d_ff,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        grad=grad,
    )


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
