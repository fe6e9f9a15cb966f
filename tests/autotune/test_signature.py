"""Buckets, families, and what counts as training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic import Dispatch, ExpertBank, Routing
from moesaic.autotune.signature import (
    Signature,
    bucket_of_rows,
    family_of,
    lowest_rows,
    spread_of,
    wants_grad,
)
from moesaic.experts import QuantFormat


@given(st.integers(1, 1 << 40))
def test_a_bucket_holds_its_rows_and_is_half_an_octave(rows: int) -> None:
    bucket = bucket_of_rows(rows)
    assert lowest_rows(bucket) <= rows < lowest_rows(bucket + 1)
    assert lowest_rows(bucket + 1) <= max(rows + 1, 1.5 * lowest_rows(bucket))
    assert bucket_of_rows(rows + 1) in (bucket, bucket + 1, bucket + 2)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=64).filter(any))
def test_the_spread_tells_how_many_experts_are_busy(counts: list[int]) -> None:
    rows = sum(counts)
    active, spread, hot = spread_of(counts, rows)
    assert active == sum(count > 0 for count in counts)
    assert 1 << spread - 1 <= active < 1 << spread
    assert hot == (active > 1 and any(count > rows / 2 for count in counts))


def bank(**options: object) -> ExpertBank:
    return ExpertBank(16, 24, 8, **options)  # type: ignore[arg-type]


def some_dispatch(tokens: int = 3) -> Dispatch:
    ids = torch.arange(2 * tokens).view(tokens, 2) % 8
    return Dispatch.from_routing(Routing(ids, torch.ones(tokens, 2), torch.ones(tokens, 8)))


def test_a_family_says_what_the_weights_are() -> None:
    x, torch_threads = torch.randn(3, 16), torch.get_num_threads()
    family = family_of(x, bank().weights(), grad=False)
    assert (family.num_experts, family.d_model, family.d_ff, family.hidden) == (8, 16, 24, 48)
    assert (family.device, family.dtype, family.format, family.threads) == ("cpu", "float32", "float32", torch_threads)
    assert family.flops_per_row == 2 * 3 * 16 * 24
    assert family.bytes_per_expert == 3 * 16 * 24 * 4
    assert family_of(x, bank(activation="relu").weights(), grad=False).hidden == 24


def test_the_layout_is_that_of_the_memory() -> None:
    x, plain = torch.randn(3, 16), bank().weights()
    turned = replace(plain, up=plain.up.detach().mT, down=plain.down.detach().mT, transposed=True)
    stored = replace(turned, up=turned.up.contiguous(), down=turned.down.contiguous())
    layouts = [family_of(x, weights, grad=False).layout for weights in (plain, turned, stored)]
    assert layouts == ["plain", "plain", "transposed"]


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_weights_are_a_family_of_their_own(name: str, bits: int) -> None:
    quantized = bank().bfloat16()
    quantized.quantize(QuantFormat.named(name))
    family = family_of(torch.randn(3, 16).bfloat16(), quantized.weights(), grad=False)
    assert (family.dtype, family.format) == ("bfloat16", name)
    assert (family.d_model, family.d_ff) == (16, 24)
    assert family.bytes_per_expert == 3 * 16 * 24 * bits / 8
    assert f"bfloat16 {name} E8 D16 F24" in str(family)


def test_the_text_names_the_buckets() -> None:
    family = family_of(torch.randn(3, 16), bank().weights(), grad=True)
    text = str(Signature(family, bucket_of_rows(40), 3, True))
    assert text.endswith("grad | 32-47 rows on 4-7 experts, one of them hot")
    assert str(Signature(family, bucket_of_rows(1), 1, False)).endswith("| 1 rows on 1 experts")
    assert str(Signature(family, bucket_of_rows(2), 0, False)).endswith("| 2 rows")


@given(st.integers(1, 1 << 20), st.integers(1, 4))
def test_a_typical_call_lies_in_its_bucket(rows: int, spread: int) -> None:
    family = family_of(torch.randn(3, 16), bank().weights(), grad=False)
    signature = Signature(family, bucket_of_rows(rows), spread, False)
    assert bucket_of_rows(signature.typical_rows()) == signature.rows
    assert 1 << spread - 1 <= signature.typical_active() < 1 << spread


class TestWantsGrad:
    def test_parameters(self) -> None:
        weights, x = bank().weights(), torch.randn(3, 16)
        assert wants_grad(x, some_dispatch(), weights)
        with torch.no_grad():
            assert not wants_grad(x, some_dispatch(), weights)
        with torch.inference_mode():
            assert not wants_grad(x, some_dispatch(), weights)

    def test_features_count_without_grad_mode_too(self) -> None:
        """Reentrant checkpointing computes without gradients first, and with them again."""
        frozen = bank().requires_grad_(False).weights()
        x = torch.randn(3, 16)
        assert not wants_grad(x, some_dispatch(), frozen)
        x.requires_grad_()
        assert wants_grad(x, some_dispatch(), frozen)
        with torch.no_grad():
            assert wants_grad(x, some_dispatch(), frozen)

    @pytest.mark.parametrize("name", ["down", "down_bias"])
    def test_any_one_parameter(self, name: str) -> None:
        partly = bank(bias=True).requires_grad_(False)
        partly.get_parameter(name).requires_grad_()
        assert wants_grad(torch.randn(3, 16), some_dispatch(), partly.weights())

    def test_routing_weights(self) -> None:
        dispatch = some_dispatch()
        dispatch.weights.requires_grad_()
        assert wants_grad(torch.randn(3, 16), dispatch, bank().requires_grad_(False).weights())
