"""Choosing a backend: names, nesting, errors, and what "auto" takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic import Dispatch, ExpertBank, Routing
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import BACKENDS, Backend, ExpertWeights, available, compute, current_backend, status, use_backend
from moesaic.experts.backend import tune_with


def work(num_experts: int = 2, width: int = 4) -> tuple[Tensor, Dispatch, ExpertWeights]:
    ids = torch.tensor([[0], [1], [0]])
    routing = Routing(ids, torch.ones(3, 1), torch.ones(3, num_experts))
    return torch.randn(3, width), Dispatch.from_routing(routing), ExpertBank(4, 6, 2).weights()


def test_context_managers_nest_and_restore() -> None:
    assert current_backend() == "auto"
    with use_backend("loop"):
        with use_backend("grouped"):
            assert current_backend() == "grouped"
        assert current_backend() == "loop"
    assert current_backend() == "auto"


def test_the_earlier_choice_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), use_backend("loop"):
        raise RuntimeError("inside")
    assert current_backend() == "auto"


def test_a_plain_call_sets_it() -> None:
    use_backend("loop")
    assert current_backend() == "loop"
    use_backend("auto")
    assert current_backend() == "auto"


def test_the_choice_is_the_processs() -> None:
    """A checkpointed layer is computed again in autograd's own threads."""
    seen: list[str] = []
    with use_backend("loop"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["loop"]


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown backend 'groupd': did you mean 'grouped'\? allowed: auto, "):
        use_backend("groupd")
    assert current_backend() == "auto"


class Picky(Backend):
    preference = 100

    def __init__(self, missing: str | None = None, refusal: str | None = None) -> None:
        self.reasons = missing, refusal

    def missing(self) -> str | None:
        return self.reasons[0]

    def refusal(self, x_TD: Tensor, weights: ExpertWeights) -> str | None:
        return self.reasons[1]

    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        return torch.full_like(x_TD, 7.0)


def test_a_backend_that_this_machine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._parts, "picky", Picky(missing="it needs a moon"))
    with pytest.raises(ConfigError, match="the backend 'picky' cannot be used here: it needs a moon"):
        use_backend("picky")
    assert "picky" not in available()
    assert status()["picky"] == "it needs a moon"


def test_a_backend_that_refuses_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._parts, "picky", Picky(refusal="too small"))
    message = "the backend 'picky' cannot run this call: too small"
    with use_backend("picky"), pytest.raises(UnsupportedError, match=message):
        compute(*work())


def test_one_choice_may_be_entered_again() -> None:
    choice = use_backend("loop")
    for _ in range(2):
        with choice:
            assert current_backend() == "loop"
            with use_backend("grouped"), choice:
                assert current_backend() == "loop"
        assert current_backend() == "auto"


def test_a_new_backend_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._parts, "newest", Picky())
    assert (compute(*work()) == 7).all()


@pytest.fixture
def untuned() -> Iterator[None]:
    before = tune_with(None)
    yield
    tune_with(before)


@pytest.mark.usefixtures("untuned")
def test_auto_takes_the_first_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._parts, "native", Picky(refusal="not here"))
    monkeypatch.setitem(BACKENDS._parts, "grouped", Picky())
    assert (compute(*work()) == 7).all()
    monkeypatch.setitem(BACKENDS._parts, "grouped", Picky(refusal="not now"))
    x, dispatch, weights = work()
    assert torch.equal(compute(x, dispatch, weights), BACKENDS.get("loop").run(x, dispatch, weights))


def test_both_of_ours_run_here() -> None:
    assert {"loop", "grouped"} <= set(available())
    assert {"loop", "grouped"} <= set(moesaic.experts.available())
    assert status()["loop"] is None


class TestWhatDoesNotFit:
    def test_width(self) -> None:
        with pytest.raises(ConfigError, match=r"the experts take features of shape \[tokens, 4\], got \[3, 5\]"):
            compute(*work(width=5))

    def test_dimensions(self) -> None:
        _, dispatch, weights = work()
        with pytest.raises(ConfigError, match=r"the experts take features of shape \[tokens, 4\], got \[1, 3, 4\]"):
            compute(torch.randn(1, 3, 4), dispatch, weights)

    def test_dtype(self) -> None:
        x, dispatch, weights = work()
        with pytest.raises(ConfigError, match=r"features are torch.float64 but the expert weights are torch.float32"):
            compute(x.double(), dispatch, weights)

    def test_dtypes_that_differ_within_the_weights(self) -> None:
        x, dispatch, weights = work()
        weights.down = weights.down.bfloat16()
        with pytest.raises(ConfigError, match=r"the expert weights are torch.bfloat16 \(down\): they must be alike"):
            compute(x, dispatch, weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert compute(x, dispatch, weights).dtype == torch.bfloat16

    def test_number_of_tokens(self) -> None:
        x, dispatch, weights = work()
        with pytest.raises(
            ConfigError, match="the routing is for 3 tokens and 2 experts, but there are 2 tokens and 2"
        ):
            compute(x[:2], dispatch, weights)

    def test_number_of_experts(self) -> None:
        with pytest.raises(
            ConfigError, match="the routing is for 3 tokens and 5 experts, but there are 3 tokens and 2"
        ):
            compute(*work(num_experts=5))
