"""What row invariance costs: ``python benchmarks/isolation.py``.

An expert layer (E64 K8 D2048 F1024) and a linear layer (2048 to 2048) on the native kernels, with and without, taking
turns; prints the time with over the time without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from moesaic.bench.timing import alternate, timed
from moesaic.cli.output import print_table
from moesaic.dispatch import Dispatch
from moesaic.experts import ACTIVATIONS, BACKENDS, ExpertWeights
from moesaic.experts.native.linear import linear
from moesaic.experts.row_invariance import row_invariant

EXPERTS, TOP_K, WIDTH, HIDDEN = 64, 8, 2048, 1024


def main() -> None:
    """Print the table."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        up = torch.randn(EXPERTS, 2 * HIDDEN, WIDTH, dtype=dtype) / WIDTH**0.5
        weights = ExpertWeights(up, torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=dtype) / 32, ACTIVATIONS.get("swiglu"))
        matrix = torch.randn(WIDTH, WIDTH, dtype=dtype)
        for tokens in (1, 32, 128, 512):
            x = torch.randn(tokens, WIDTH).to(dtype)
            ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K]
            dispatch = Dispatch.from_slots(ids, torch.rand(tokens, TOP_K), EXPERTS)
            layer = ratio(lambda _, x=x, d=dispatch, w=weights: BACKENDS.get("native").run(x, d, w))
            one = ratio(lambda alike, x=x, w=matrix: linear(x, w, row_invariant=alike))
            rows.append([str(dtype).removeprefix("torch."), str(tokens), layer, one])
    print_table("Row-invariant over free", ["dtype", "tokens", "experts", "linear layer"], rows)


@torch.inference_mode()
def ratio(work: Callable[[bool], object]) -> str:
    """Median time of row-invariant calls over that of the others."""

    def run(alike: bool) -> float:
        with row_invariant() if alike else nullcontext():
            return timed(lambda: work(alike))

    times, _ = alternate({"free": lambda _: run(False), "alike": lambda _: run(True)}, {}, 1.2, least_rounds=5)
    return f"{times['alike'].median / times['free'].median:.2f}"


if __name__ == "__main__":
    main()
