"""The warm start: against least squares by torch.linalg.lstsq in float64, and what it must not spoil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.convert.models import dense_folder
from tests.convert.test_calibration import text_folder
from torch import Tensor

from moesaic.convert import SplitSettings, UpcycleSettings, check_dense, open_source, split, upcycle
from moesaic.convert import refitting as module
from moesaic.convert.refitting import refit
from moesaic.convert.teacher import load_dense
from moesaic.errors import CheckpointError, DataError
from moesaic.hf.load import load_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("dense") / "model")


def both(dense: Path, out: Path, **settings: Any) -> tuple[Any, Any]:
    options: dict[str, Any] = {"experts": 4, "tokens": 400, "sequence_length": 48, "held_out": 0.0, **settings}
    split(dense, out, SplitSettings(data=text_folder(out.with_name("text")), **options))
    student, _ = load_model(out, dtype=torch.float32, device="cpu")
    return student, load_dense(check_dense(open_source(dense)), torch.float32)


def passages(count: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 40), generator=torch.Generator().manual_seed(1))


def test_the_teacher_is_the_dense_model(dense: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = passages(2)
    theirs = AutoModelForCausalLM.from_pretrained(dense).eval()(ids).logits
    teacher = load_dense(check_dense(open_source(dense)), torch.float32)
    torch.testing.assert_close(teacher(ids).logits, theirs, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("close", [module.CLOSE, 0.0])
def test_with_all_experts_on_nothing_changes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close: float
) -> None:
    monkeypatch.setattr(module, "CLOSE", close)
    student, teacher = both(dense, tmp_path / "out", active=1.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    reached = refit(student, teacher, passages())
    assert all(each.after < 1e-8 for each in reached.values())
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)


def test_copies_of_the_feed_forward_are_not_fitted(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In neither precision: that would take long, for nothing."""
    upcycle(dense, tmp_path / "out", UpcycleSettings(num_experts=4))
    student, _ = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")
    teacher = load_dense(check_dense(open_source(dense)), torch.float32)

    def solve(*_: object) -> None:
        raise AssertionError("it was fitted")

    monkeypatch.setattr(torch.linalg, "solve", solve)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            reached = refit(student, teacher, passages())
        assert set(reached) == {0, 1} and all(each.after == each.before < 0.01 for each in reached.values())


@pytest.mark.parametrize("shared", [0, 8])
def test_the_first_layer_is_the_least_squares_solution(dense: Path, tmp_path: Path, shared: int) -> None:
    student, teacher = both(dense, tmp_path / "out", active=0.5 if not shared else 7 / 12, shared=shared)
    ids, ridge = passages(), 0.01
    layer = student.model.layers[0]
    seen: dict[str, Tensor] = {}
    layer.mlp.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    with torch.no_grad():
        outputs = student.model(ids, output_hidden_states=True).hidden_states[1]
        theirs = teacher.model(ids, output_hidden_states=True).hidden_states[1].flatten(0, 1).double()
    x, routing, bank = seen["x"].flatten(0, 1), layer.mlp.last_routing, layer.mlp.experts
    target = theirs - (outputs.flatten(0, 1) - seen["y"].flatten(0, 1)).double()
    width = bank.d_ff
    hidden = torch.zeros(len(x), 4 * width + shared, dtype=torch.float64)
    with torch.no_grad():
        for token in range(len(x)):
            for expert, weight in zip(routing.expert_ids[token].tolist(), routing.weights[token], strict=True):
                gate, up = (bank.up[expert] @ x[token]).chunk(2)
                hidden[token, expert * width : (expert + 1) * width] = (
                    weight * torch.nn.functional.silu(gate) * up
                ).double()
            if shared:
                gate, up = layer.mlp.shared.up(x[token]).chunk(2)
                hidden[token, 4 * width :] = (torch.nn.functional.silu(gate) * up).double()
    old = torch.cat([bank.down[expert].T for expert in range(4)]).detach().double()
    if shared:
        old = torch.cat([old, layer.mlp.shared.down.weight.T.detach().double()])
    root = theirs.square().mean(1, keepdim=True).rsqrt()
    counted = hidden * root
    strength = (ridge * counted.square().sum(0).mean()).sqrt()
    rows = torch.cat([counted, strength * torch.eye(len(old), dtype=torch.float64)])
    wanted = torch.cat([target * root, strength * old])
    expected = torch.linalg.lstsq(rows, wanted).solution
    reached = refit(student, teacher, ids, ridge=ridge)
    found = torch.cat([bank.down[expert].T for expert in range(4)])
    if shared:
        found = torch.cat([found, layer.mlp.shared.down.weight.T])
    torch.testing.assert_close(found.detach().double(), expected, rtol=2e-3, atol=2e-4)
    error = ((target - hidden @ expected) * root).square().sum() / (target * root).square().sum()
    assert reached[0].after == pytest.approx(error.item(), rel=1e-2)
    assert reached[0].after < reached[0].before


def test_the_model_as_a_whole_comes_nearer(dense: Path, tmp_path: Path) -> None:
    student, teacher = both(dense, tmp_path / "out")
    ids = passages(24)

    def distance() -> float:
        with torch.no_grad():
            return float((student(ids).logits - teacher(ids).logits).norm() / teacher(ids).logits.norm())

    before = distance()
    routers = [layer.mlp.router.weight.clone() for layer in student.model.layers]
    reached = refit(student, teacher, ids)
    assert distance() < before
    with torch.no_grad():
        streams = [model.model(ids, output_hidden_states=True).hidden_states[-2] for model in (student, teacher)]
    # The last layer is the second: what is told of the first one is in the model's own forward.
    error = (streams[0] - streams[1]).square().sum() / streams[1].square().sum()
    assert error < reached[0].before
    for layer, weight in zip(student.model.layers, routers, strict=True):
        torch.testing.assert_close(layer.mlp.router.weight, weight)


@pytest.mark.parametrize("window", [None, 6, 40, 64])
def test_streams_are_those_of_the_models(tmp_path: Path, window: int | None) -> None:
    """With attention over a window, too, shorter than a passage or not."""
    dense = dense_folder(tmp_path / "dense", "mistral", sliding_window=window)
    student, teacher = both(dense, tmp_path / "out")
    ids = passages()
    with torch.no_grad():
        streams = module._Streams(student, teacher, ids)
        for number in range(2):
            streams.advance(number)
            for model, found in ((student, streams.student_BSD), (teacher, streams.teacher_BSD)):
                seen: list[Tensor] = []
                hook = model.model.layers[number].register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
                model.model(ids)
                hook.remove()
                torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-4)


def test_one_router_for_all_layers(dense: Path, tmp_path: Path) -> None:
    student, teacher = both(dense, tmp_path / "out", pre_gating="stack")
    reached = refit(student, teacher, passages(24))
    assert set(reached) == {0, 1} and all(each.after < each.before for each in reached.values())


def test_under_autocast_the_fit_is_float32(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = both(dense, tmp_path / "out")
    plain, grams, hiddens = module._hidden, [], []
    solve = torch.linalg.solve

    def hidden(*args: Any) -> Tensor:
        hiddens.append(plain(*args))
        return hiddens[-1]

    def solved(gram: Tensor, missing: Tensor) -> Tensor:
        grams.append(gram)
        return solve(gram, missing)

    monkeypatch.setattr(module, "_hidden", hidden)
    monkeypatch.setattr(torch.linalg, "solve", solved)
    monkeypatch.setattr(module, "_count", lambda stream_TD: torch.ones(len(stream_TD), 1))
    with torch.autocast("cpu", torch.bfloat16):
        refit(student, teacher, passages(), ridge=0.0)
    for gram, found in zip(grams, hiddens[::2], strict=True):
        assert found.dtype == torch.float32
        expected = found.double().T @ found.double()
        torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_values_that_are_not_finite_are_told(dense: Path, tmp_path: Path) -> None:
    student, teacher = both(dense, tmp_path / "out")
    with torch.no_grad():
        student.model.layers[1].mlp.experts.up[:, 2, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"what layer 2 of the student \(model.layers.1\) gives is not finite"):
        refit(student, teacher, passages())


def test_too_few_tokens_are_refused(dense: Path, tmp_path: Path) -> None:
    student, teacher = both(dense, tmp_path / "out")
    with pytest.raises(DataError, match="the warm start has 10 tokens: a layer has 24 hidden neurons to fit"):
        refit(student, teacher, passages()[:1, :10])
