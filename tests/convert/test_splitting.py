"""A split model is the dense one with all experts on, whatever the criterion; what cannot be split is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import SIZES, byte_tokenizer, dense_folder
from tests.convert.test_calibration import text_folder
from torch import Tensor
from transformers import MixtralConfig

from moesaic.convert import Split, SplitSettings, check_dense, open_source, split
from moesaic.convert import splitting as module
from moesaic.convert.splitting import plan_split
from moesaic.convert.writing import partial_path
from moesaic.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.load import load_model

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {}),
    ("qwen3", {"hidden_act": "gelu"}),
]
WAYS: list[dict[str, Any]] = [
    {},
    {"shared": 16},
    {"criterion": "weight"},
    {"criterion": "coactivation", "pre_gating": "stack"},
    {"criterion": "domain", "shared": 8},
    {"pre_gating": "stack"},
    {"straight_through": True},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return text_folder(tmp_path_factory.mktemp("text"))


def settings(text: tuple[str, ...], **changes: Any) -> SplitSettings:
    options: dict[str, Any] = {"experts": 4, "tokens": 400, "sequence_length": 48, "held_out": 0.0, "data": text}
    return SplitSettings(**{**options, **changes})


def logits(path: Path, top_k: int | None = None) -> Tensor:
    model = load_model(path)[0]
    if top_k is not None:
        assert isinstance(model, MoesaicForCausalLM)
        for layer in model.model.layers:
            layer.mlp.router.top_k = top_k  # type: ignore[union-attr, assignment]
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_all_on_is_the_dense_model(
    tmp_path: Path, data: tuple[str, ...], family: str, changes: dict[str, Any], way: dict[str, Any]
) -> None:
    path, out = dense_folder(tmp_path / "dense", family, **changes), tmp_path / "out"
    made = split(path, out, settings(data, active=1.0, **way))
    expected = logits(path)
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (made.active, made.plan.top_k) == (1.0, 4)
    assert all(share == pytest.approx(1.0, abs=1e-5) for share in (*made.explained, *made.explained_best))
    model = load_model(out)[0]
    model.save_pretrained(tmp_path / "again")
    byte_tokenizer().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(out))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_half_on_is_the_sum_of_the_chosen_neurons(tmp_path: Path, data: tuple[str, ...], way: dict[str, Any]) -> None:
    """Each layer's output is that of the dense feed-forward with the other experts' neurons at 0."""
    path, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    active = (way.get("shared", 0) + 2 * (48 - way.get("shared", 0)) / 4) / 48
    made = split(path, out, settings(data, active=active, **way))
    assert (made.plan.top_k, made.plan.shared) == (2, way.get("shared", 0))
    assert made.active == pytest.approx(active)
    dense, model = check_dense(open_source(path)), load_model(out)[0]
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0)))
    for number, (x, y) in enumerate(seen):
        gate, up, down = (dense.source.read(name) for name in dense.ffn(number))
        routing, experts = model.model.layers[number].mlp.last_routing, model.model.layers[number].mlp.experts
        row = {tuple(weights.tolist()): neuron for neuron, weights in enumerate(gate)}
        width = made.plan.d_ff
        members = [[row[tuple(weights.tolist())] for weights in experts.up[e, :width]] for e in range(4)]
        is_routed = {neuron for own in members for neuron in own}
        assert len(is_routed) == 48 - made.plan.shared  # every neuron is in one expert
        for token in range(20):
            chosen = set(range(48)) - is_routed
            chosen |= {n for e in routing.expert_ids[token].tolist() for n in members[e]}
            hidden = torch.nn.functional.silu(gate @ x[0, token]) * (up @ x[0, token])
            expected = sum((hidden[n] * down[:, n] for n in chosen), torch.zeros(32))
            torch.testing.assert_close(y[0, token], expected, rtol=1e-4, atol=1e-4)
    if way.get("pre_gating") == "stack":
        first, second = (layer.mlp.last_routing for layer in model.model.layers)
        assert torch.equal(first.expert_ids, second.expert_ids)
        assert made.explained == ()
    else:
        assert all(0 < share <= best < 1 for share, best in zip(made.explained, made.explained_best, strict=True))


def test_the_router_is_better_than_chance_and_experts_than_others(tmp_path: Path, data: tuple[str, ...]) -> None:
    path = dense_folder(tmp_path / "dense")
    made = split(path, tmp_path / "out", settings(data, experts=8, active=0.5))
    state = load_file(tmp_path / "out" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    whole = logits(path)
    ours = (logits(tmp_path / "out") - whole).norm()
    others = []
    for _ in range(5):
        model = load_model(tmp_path / "out")[0]
        for layer in model.model.layers:
            layer.mlp.router.weight.data.normal_(generator=generator)
        ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            others.append((model(ids).logits - whole).norm())
    assert ours < min(others)
    assert min(made.explained) > 0.5
    assert not state["model.layers.0.mlp.router.scale"].any()


def test_bfloat16_stays(tmp_path: Path, data: tuple[str, ...]) -> None:
    path = tmp_path / "dense"
    load_model(dense_folder(tmp_path / "float"))[0].bfloat16().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    split(path, tmp_path / "out", settings(data, active=1.0))
    model = load_model(tmp_path / "out")[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    gap = (logits(tmp_path / "out").float() - logits(path).float()).norm() / logits(path).float().norm()
    assert gap < 0.02


def test_weights_of_several_precisions_become_one(tmp_path: Path, data: tuple[str, ...]) -> None:
    path = dense_folder(tmp_path / "dense")
    state = load_file(path / "model.safetensors")
    is_kept = {name: "norm" in name or "embed" in name for name in state}
    mixed = {name: tensor if is_kept[name] else tensor.bfloat16() for name, tensor in state.items()}
    save_file(mixed, path / "model.safetensors", metadata={"format": "pt"})
    split(path, tmp_path / "out", settings(data, pre_gating="stack"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def stop(*_: Any, **__: Any) -> Split:
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", [{}, {"pre_gating": "stack"}], ids=str)
def test_goes_on_where_it_stopped(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    path, cut = dense_folder(tmp_path / "dense", num_hidden_layers=4), module._cut
    whole = split(path, tmp_path / "whole", settings(data, **way))
    done: list[int] = []
    said: list[str] = []

    def interrupted(layer: Any, *rest: Any) -> dict[str, Tensor]:
        if len(done) == 2 or (len(done) == 3 and layer.layer == 3):
            done.append(-1)
            raise KeyboardInterrupt
        done.append(layer.layer)
        return cut(layer, *rest)

    monkeypatch.setattr(module, "_cut", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        split(path, out, settings(data, **way))
    assert done == [0, 1, -1] and not out.exists()
    with pytest.raises(CheckpointError, match="an unfinished conversion with other settings"):
        split(path, out, settings(data, active=0.25, **way))
    monkeypatch.setattr(module, "write_model", stop)
    with pytest.raises(KeyboardInterrupt):
        split(path, out, settings(data, **way), say=said.append)
    assert next(line for line in said if "activations" in line).startswith("layer 3 of 4")
    assert done == [0, 1, -1, 2, 3] and partial_path(out).exists()
    monkeypatch.undo()
    monkeypatch.setattr(module, "_cut", stop)
    again = split(path, out, settings(data, **way))
    assert (again.explained, again.explained_best) == (whole.explained, whole.explained_best)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def interrupted(path: Path, out: Path, options: SplitSettings) -> Path:
    """A split that was stopped after its calibration; its folder ``work``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            split(path, out, options)
    return partial_path(out) / "work"


def test_another_model_or_text_is_refused_to_go_on_with(tmp_path: Path, data: tuple[str, ...]) -> None:
    path, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    (tmp_path / "words.txt").write_text("one two three " * 200)
    options = settings((f"prose={tmp_path / 'words.txt'}",))
    interrupted(path, out, options)
    (tmp_path / "words.txt").write_text("one two four! " * 200)
    with pytest.raises(
        CheckpointError, match=r"unfinished conversion with other settings \(text: 'v1:.* to begin anew"
    ):
        split(path, out, options)
    (tmp_path / "words.txt").write_text("one two three " * 200)
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(content: 'v1:.*; digests of what is in it: it is another one, or"):
        split(path, out, options)


@pytest.mark.parametrize("file", ["hidden.safetensors", "layer-00001.safetensors"])
def test_what_an_earlier_start_left_damaged_is_told(tmp_path: Path, data: tuple[str, ...], file: str) -> None:
    path, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    work = interrupted(path, out, settings(data))
    (work / file).write_bytes((work / file).read_bytes()[:-5])
    (work / "layer-00000.safetensors").unlink()  # so that the calibration goes on
    if file.startswith("layer"):
        (work / "hidden.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{file}' is damaged: .*; remove '.*work', and the same command makes"):
        split(path, out, settings(data))
    shutil.rmtree(work)
    split(path, out, settings(data))


@pytest.mark.parametrize(
    ("name", "factor", "told"),
    [
        ("1.self_attn.o_proj", float("nan"), r"what enters the feed-forward of layer 2 \(model.layers.1\)"),
        ("0.mlp.up_proj", 1e38, r"the hidden neurons of layer 1 \(model.layers.0\)"),
        ("1.mlp.up_proj", 1e20, r"the square of the neurons' output of layer 2 \(model.layers.1\)"),
    ],
)
def test_a_model_that_is_not_finite_is_refused(
    tmp_path: Path, data: tuple[str, ...], name: str, factor: float, told: str
) -> None:
    path = dense_folder(tmp_path / "dense")
    state = load_file(path / "model.safetensors")
    state[f"model.layers.{name}.weight"] *= factor
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{told} is not finite .* damaged, or too large for float32"):
        split(path, tmp_path / "out", settings(data))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"experts": 16, "tokens": 500}, DataError, r"too short for 16 experts: it has 500 tokens, at least 512"),
    ({"sequence_length": 129}, ConfigError, r"sequence_length is 129: '.*dense' reads at most 128 tokens at once"),
    ({"experts": 49}, ConfigError, r"experts is 49 and shared is 0: of 48 .* leaves an expert empty; .* up to 48"),
    ({"shared": 46}, ConfigError, r"experts is 4 and shared is 46: of 48 hidden neurons this leaves an expert empty"),
    ({"experts": 5}, ConfigError, r"cannot be cut into 5 experts of one size: shared may be 3"),
    ({"shared": 15}, ConfigError, r"33 hidden neurons \(48 less 15 shared\) .*: shared may be 12 or 16"),
    ({"active": 0.6}, ConfigError, r"active is 0.6: with 4 experts of 12 .* may be 0.5 \(2 of 4\) or 0.75 \(3 of 4\)"),
    ({"active": 0.05}, ConfigError, r"active is 0.05: .* it may be 0.25 \(1 of 4\) or 0.5"),
    ({"shared": 24, "active": 0.5}, ConfigError, r"active is 0.5: .* it may be 0.625 \(1 of 4\) or 0.75"),
    ({"criterion": "domain", "experts": 1, "active": 1.0}, ConfigError, r"at least 2 domains .*: there are 2 \(code, "),
    ({"data": ("nowhere",)}, DataError, "data path 'nowhere' does not exist"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=str)
def test_what_cannot_be_split_is_refused_before_any_work(
    tmp_path: Path,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = dense_folder(tmp_path / "dense")
    monkeypatch.setattr(module, "_calibrate", stop)
    with pytest.raises(error, match=message):
        split(path, tmp_path / "out", settings(data, **changes))
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense"}


def test_domains_that_are_too_few_or_too_short_for_their_criterion(tmp_path: Path, data: tuple[str, ...]) -> None:
    path = dense_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"there are 1 \(prose\) and 4 experts; give data as DOMAIN=PATH"):
        split(path, tmp_path / "out", settings(data[:1], criterion="domain"))
    (tmp_path / "note.txt").write_text("Too short. " * 4)
    little = (data[0], f"note={tmp_path / 'note.txt'}")
    with pytest.raises(DataError, match=r"domain note is too short for its 2 experts: it has 44 tokens, at least 64"):
        split(path, tmp_path / "out", settings(little, criterion="domain"))
    split(path, tmp_path / "out", settings(little))


@pytest.mark.parametrize(("positions", "length"), [(40, 40), (512, 512), (1024, 512)])
def test_passages_are_as_long_as_the_model_reads_unless_told(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, positions: int, length: int
) -> None:
    path = dense_folder(tmp_path / "dense", max_position_embeddings=positions)
    options = settings(data, sequence_length=None)
    interrupted(path, tmp_path / "out", options)
    noted = json.loads((partial_path(tmp_path / "out") / "conversion.json").read_text())
    assert noted["sequence_length"] == length
    split(path, tmp_path / "out", settings(data, sequence_length=length))  # goes on
    with pytest.raises(ConfigError, match=f"dense' reads at most {positions} tokens at once"):
        split(path, tmp_path / "other", settings(data, sequence_length=positions + 1))


def test_models_and_folders_that_are_refused(tmp_path: Path, data: tuple[str, ...]) -> None:
    path = dense_folder(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out' exists already"):
        split(path, tmp_path / "out", settings(data))
    made = tmp_path / "made"
    split(path, made, settings(data))
    with pytest.raises(UnsupportedError, match=r"is a mixture of experts already \(moesaic\): prune takes it"):
        split(made, tmp_path / "new", settings(data))
    MixtralConfig(**SIZES).save_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no weights as safetensors"):
        split(tmp_path / "none", tmp_path / "new", settings(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts is 0: it must be a whole number from 1 on"),
        ({"shared": -1}, "shared is -1"),
        ({"tokens": 2.5}, "tokens is 2.5"),
        ({"active": 0.0}, "active is 0.0: it must be above 0 and at most 1"),
        ({"active": 1.5}, "active is 1.5"),
        ({"held_out": 1.0}, "held_out is 1.0: it must be at least 0 and below 1"),
        ({"criterion": "weights"}, "unknown criterion 'weights': did you mean 'weight'"),
        ({"pre_gating": "layer"}, "unknown pre_gating 'layer': .*allowed: none, stack"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitSettings(**changes)


def test_sizes() -> None:
    def sizes() -> Iterator[tuple[int, ...]]:
        for options in ({}, {"shared": 384, "experts": 24}, {"experts": 1, "active": 1.0}, {"active": 0.0625}):
            plan = plan_split(1536, SplitSettings(**options))
            yield plan.experts, plan.d_ff, plan.top_k, plan.shared

    assert list(sizes()) == [(16, 96, 8, 0), (24, 48, 8, 384), (1, 1536, 1, 0), (16, 96, 1, 0)]
