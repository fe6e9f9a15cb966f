"""Paged attention in every instruction-set variant: held to float64, and bit for bit to itself in other batches."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tests.experts.native.problems import ISAS, needs_library
from torch import Tensor

from moesaic.experts.native import attention, library

pytestmark = [needs_library, pytest.mark.usefixtures("isa")]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
PAGE = attention.PAGE_SIZE
# heads, heads of keys, width of keys, width of values
SHAPES = [(4, 2, 64, 64), (3, 1, 33, 20), (4, 4, 128, 72), (70, 1, 8, 8)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.use_isa(request.param):
        yield


class Cache:
    """Some sequences with all their queries, keys and values, and pools whose pages they share in random order."""

    def __init__(self, lengths: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        heads, kv_heads, key_width, value_width = shape
        generator = torch.Generator().manual_seed(sum(lengths))

        def draw(tokens: int, *rest: int) -> Tensor:
            return torch.randn(tokens, *rest, generator=generator).to(dtype)

        self.lengths, self.scaling = lengths, key_width**-0.5
        self.queries = [draw(length, heads, key_width) for length in lengths]
        self.keys = [draw(length, kv_heads, key_width) for length in lengths]
        self.values = [draw(length, kv_heads, value_width) for length in lengths]
        needed = [-(-length // PAGE) for length in lengths]
        pages = torch.randperm(sum(needed) + 2, generator=generator, dtype=torch.int32)
        self.tables = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
        for row, part in zip(self.tables, pages[: sum(needed)].split(needed), strict=True):
            row[: len(part)] = part
        # What was never written must never be read.
        self.key_pool = torch.full((len(pages), kv_heads, key_width, PAGE), torch.nan, dtype=dtype)
        self.value_pool = torch.full((len(pages), kv_heads, PAGE, value_width), torch.nan, dtype=dtype)

    def attend(self, parts: list[tuple[int, int, int]], **options: object) -> Tensor:
        """The tokens ``begin`` to ``end`` of some sequences."""
        places = [torch.arange(begin, end) for _, begin, end in parts]
        batch = SimpleNamespace(
            tables_SP=self.tables[[sequence for sequence, _, _ in parts]],
            starts=torch.tensor([0, *(end - begin for _, begin, end in parts)]).cumsum(0).int(),
            contexts=torch.tensor([end for _, _, end in parts]).int(),
            slots_T=torch.cat(
                [
                    self.tables[sequence].long()[place // PAGE] * PAGE + place % PAGE
                    for (sequence, _, _), place in zip(parts, places, strict=True)
                ]
            ),
        )
        query, keys, values = (
            torch.cat([all_of[sequence][begin:end] for sequence, begin, end in parts])
            for all_of in (self.queries, self.keys, self.values)
        )
        # As transformers has it: heads before tokens.
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
        return attention.attend(
            query,
            keys,
            values,
            self.key_pool,
            self.value_pool,
            batch,
            self.scaling,
            **options,  # type: ignore[arg-type]
        )

    def wanted(self, sequence: int, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
        """All tokens of a sequence at once, in float64."""
        query, length = self.queries[sequence].double(), self.lengths[sequence]
        group = query.shape[1] // self.keys[sequence].shape[1]
        keys, values = (all_of[sequence].double().repeat_interleave(group, 1) for all_of in (self.keys, self.values))
        logits = torch.einsum("nhd,chd->hnc", query, keys) * self.scaling
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        age = torch.arange(length)[:, None] - torch.arange(length)
        logits = logits.masked_fill((age < 0) | (age >= (window or length)), -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, length, 1)], dim=-1)
        return torch.einsum("hnc,chd->nhd", logits.softmax(-1)[..., :length], values)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(0, 0.0, False), (9, 5.0, False), (0, 0.0, True), (17, 0.0, True)]
)
def test_outputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, window: int, softcap: float, sinks: bool
) -> None:
    lengths, before = [5, 40, 83, 16], [4, 33, 0, 1]
    cache = Cache(lengths, shape, dtype)
    options = {"window": window, "softcap": softcap, "sinks": torch.linspace(-1, 2, shape[0]) if sinks else None}
    cache.attend([(sequence, 0, count) for sequence, count in enumerate(before) if count], **options)
    got = cache.attend([(s, begin, end) for s, (begin, end) in enumerate(zip(before, lengths, strict=True))], **options)
    wanted = torch.cat([cache.wanted(s, **options)[begin:] for s, begin in enumerate(before)])  # type: ignore[arg-type]
    assert got.dtype == dtype and got.is_contiguous()
    assert float((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_do_not_depend_on_chunks_and_batch(dtype: torch.dtype) -> None:
    cache = Cache([70, 33, 100], SHAPES[0], dtype)
    together = cache.attend([(0, 0, 70), (1, 0, 33), (2, 0, 100)], window=40)
    alone = []
    for begin, end in ((0, 1), (1, 17), (17, 18), (18, 32), (32, 70)):
        alone.append(cache.attend([(0, begin, end)], window=40))
    assert torch.equal(torch.cat(alone), together[:70])


def test_padding_is_stored_nowhere() -> None:
    cache = Cache([3], SHAPES[0], torch.float32)
    batch = SimpleNamespace(
        tables_SP=cache.tables,
        starts=torch.tensor([0, 3]).int(),
        contexts=torch.tensor([3]).int(),
        slots_T=torch.tensor([-1, -1, -1]),
    )
    attention.attend(
        cache.queries[0], cache.keys[0], cache.values[0], cache.key_pool, cache.value_pool, batch, cache.scaling
    )
    assert cache.key_pool.isnan().all() and cache.value_pool.isnan().all()


def test_refusals() -> None:
    query, keys, values = torch.zeros(2, 4, 8), torch.zeros(3, 2, 8, PAGE), torch.zeros(3, 2, PAGE, 8)
    assert attention.refusal(query, keys, values) is None
    assert "one dtype" in str(attention.refusal(query.half(), keys, values))
    assert "pages of 16" in str(attention.refusal(query, keys[..., :8], values))
    assert "on a CPU" in str(attention.refusal(query.to("meta"), keys, values))
