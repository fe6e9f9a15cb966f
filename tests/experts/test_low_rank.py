"""The seam for low-rank parts: who computes which token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.dispatch import Dispatch
from moesaic.experts import ExpertBank, ExpertWeights, compute_and_tell, use_backend
from moesaic.experts.low_rank import split

IDS = torch.tensor([[0, 2], [1, 4], [2, 0], [4, 4], [3, 1]])  # of 4 experts; 4 is a null slot
WEIGHTS = torch.rand(5, 2)
CHOSEN = torch.tensor([True, False, False, True, True])


class Doubling:
    """Says twice what the experts say, of the tokens that it is given, and remembers which they were."""

    active = True

    def __init__(self, tokens: Tensor | None) -> None:
        self.tokens, self.seen = tokens, torch.empty(0)

    def compute(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        self.seen = (dispatch.inverse < len(dispatch.permutation)).any(dim=1)
        return 2 * compute_and_tell(x_TD, dispatch, replace(weights, low_rank=None))[0]


def test_split_parts_the_slots_by_token() -> None:
    chosen, others = split(Dispatch.from_slots(IDS, WEIGHTS, 4), CHOSEN)
    for part, tokens in ((chosen, CHOSEN), (others, ~CHOSEN)):
        wanted = Dispatch.from_slots(IDS.masked_fill(~tokens[:, None], 4), WEIGHTS, 4)
        for name, tensor in vars(wanted).items():
            assert torch.equal(getattr(part, name), tensor), name


@pytest.mark.parametrize("tokens", [None, CHOSEN])
def test_tokens_with_a_part_are_computed_by_who_brings_it_and_the_others_as_ever(tokens: Tensor | None) -> None:
    torch.manual_seed(0)
    bank = ExpertBank(16, 8, 4)
    x_TD, dispatch = torch.randn(5, 16), Dispatch.from_slots(IDS, WEIGHTS, 4)
    with torch.no_grad(), use_backend("loop"):
        plain = bank(x_TD, dispatch)
        bank.low_rank = doubling = Doubling(tokens)  # type: ignore[assignment]
        got = bank(x_TD, dispatch)
    mask = torch.ones(5, dtype=torch.bool) if tokens is None else tokens
    torch.testing.assert_close(got, torch.where(mask[:, None], 2 * plain, plain), rtol=0, atol=1e-6)
    assert doubling.seen.tolist() == [True, tokens is None, tokens is None, False, True]
    assert bank.last_choice is not None
    assert bank.last_choice.backend == ("low-rank" if tokens is None else "loop")


def test_one_that_is_at_rest_is_not_asked() -> None:
    bank = ExpertBank(16, 8, 4)
    x_TD, dispatch = torch.randn(5, 16), Dispatch.from_slots(IDS, WEIGHTS, 4)
    plain = bank(x_TD, dispatch)
    doubling = Doubling(None)
    doubling.active = False
    bank.low_rank = doubling  # type: ignore[assignment]
    assert torch.equal(bank(x_TD, dispatch), plain) and not len(doubling.seen)
