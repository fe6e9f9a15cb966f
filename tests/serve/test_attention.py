"""Attention over pages equals attention over the whole sequence; the native kernel equals the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.serve.tiny import tiny
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.experts.native import attention as native
from moesaic.serve.attention import PagedBatch, attend

PAGE = 16
ATTEND = [
    attend,
    pytest.param(
        native.attend,
        marks=pytest.mark.skipif(native.library.missing() is not None, reason="the native kernels are not here"),
    ),
]


def dense(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """One sequence at once, in float64: queries ``[C, H, d]`` of all its tokens."""
    length, heads, _ = query.shape
    query, keys, values = (x.double().transpose(0, 1) for x in (query, keys, values))
    keys, values = (x.repeat_interleave(heads // x.shape[0], 0) for x in (keys, values))
    scores = query @ keys.transpose(1, 2) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((distance < 0) | (distance >= (window or length)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, length, 1)], -1)
    return (scores.softmax(-1)[..., :length] @ values).transpose(0, 1)


@pytest.mark.parametrize("run", ATTEND)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks", "key_heads", "widths"),
    [
        (0, 0.0, False, 4, (8, 8)),
        (0, 0.0, False, 2, (24, 16)),
        (7, 0.0, False, 1, (16, 16)),
        (40, 3.0, False, 2, (16, 16)),
        (20, 0.0, True, 2, (16, 16)),
    ],
)
def test_pages_and_chunks_change_nothing(
    run: Callable[..., Tensor], window: int, softcap: float, sinks: bool, key_heads: int, widths: tuple[int, int]
) -> None:
    rng = np.random.default_rng(window)
    torch.manual_seed(0)
    heads, lengths = 4, [1, 16, 37, 70]
    sink = torch.randn(heads) if sinks else None
    sequences = [
        tuple(
            torch.randn(length, h, d) for h, d in ((heads, widths[0]), (key_heads, widths[0]), (key_heads, widths[1]))
        )
        for length in lengths
    ]
    expected = [dense(*each, 0.3, window, softcap, sink) for each in sequences]
    key_pool = torch.full((24, key_heads, widths[0], PAGE), torch.nan)
    value_pool = torch.full((24, key_heads, PAGE, widths[1]), torch.nan)
    tables = rng.permutation(24)[: 4 * 5].reshape(4, 5).astype(np.int32)
    done = [0] * 4
    while any(a < b for a, b in zip(done, lengths, strict=True)):
        chosen = [s for s in rng.permutation(4).tolist() if done[s] < lengths[s]]
        chunks = [(s, done[s], int(rng.integers(done[s] + 1, lengths[s] + 1))) for s in chosen]
        positions = [np.arange(start, end) for _, start, end in chunks]
        slots = [
            tables[s, p // PAGE].astype(np.int64) * PAGE + p % PAGE
            for (s, *_), p in zip(chunks, positions, strict=True)
        ]
        batch = PagedBatch(
            torch.from_numpy(tables[chosen]),
            torch.from_numpy(np.cumsum([0, *map(len, positions)]).astype(np.int32)),
            torch.tensor([end for *_, end in chunks], dtype=torch.int32),
            torch.from_numpy(np.concatenate(slots)),
        )
        new = [torch.cat([sequences[s][i][start:end] for s, start, end in chunks]) for i in range(3)]
        out = run(*new, key_pool, value_pool, batch, 0.3, window, softcap, sink)
        wanted = torch.cat([expected[s][start:end] for s, start, end in chunks])
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        for s, _, end in chunks:
            done[s] = end


def test_outside_an_engine_it_is_refused() -> None:
    model = tiny("llama")
    model.set_attn_implementation("moesaic")
    with pytest.raises(UnsupportedError, match=r"inside moesaic\.serve\.Engine only"):
        model(torch.zeros(1, 3, dtype=torch.int64))
