"""What is seen of a dense model's neurons, layer by layer, and what is made of it, against slow references."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.convert.models import dense_folder
from torch import Tensor

from moesaic.convert import check_dense, open_source
from moesaic.convert.activations import FeedForward, feed_forwards, read_text
from moesaic.convert.criteria import CRITERIA, MARKED, Neurons, always_active, observe
from moesaic.convert.meter import metered
from moesaic.convert.routers import GateFit, align, contributions, explained
from moesaic.errors import CheckpointError, DataError
from moesaic.hf.load import load_model


def text_folder(path: Path) -> tuple[str, ...]:
    """Two domains of a few hundred tokens."""
    for name, line in (("prose", "The quick brown fox jumps over it.\n"), ("code", "def f(x):\n    return x + 1\n")):
        (path / name).mkdir(parents=True)
        for number in range(3):
            (path / name / f"{number}.txt").write_text(f"{number} {line}" * (12 + number))
    return tuple(f"{name}={path / name}" for name in ("prose", "code"))


def random_layer(tokens: int = 50, width: int = 8, hidden: int = 12, seed: int = 0) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(hidden, width, generator=generator) for _ in range(2))
    down = torch.randn(width, hidden, generator=generator)
    inputs = torch.randn(tokens, width, generator=generator)
    return FeedForward(0, gate, up, down, inputs, "swiglu")


def slow_hidden(layer: FeedForward, token: int, neuron: int) -> float:
    gate = sum(float(w) * float(x) for w, x in zip(layer.gate[neuron], layer.inputs[token], strict=True))
    up = sum(float(w) * float(x) for w, x in zip(layer.up[neuron], layer.inputs[token], strict=True))
    return gate / (1 + math.exp(-gate)) * up


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
]


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_inputs_are_those_of_the_whole_model(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    path = dense_folder(tmp_path / "dense", family, **changes)
    dense = check_dense(open_source(path))
    text = read_text(dense.source, text_folder(tmp_path), tokens=400, sequence_length=50, held_out=0.3)
    whole = load_model(path)[0]
    entered: list[list[Tensor]] = [[] for _ in range(dense.num_layers)]
    for layer, seen in zip(whole.model.layers, entered, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
    with torch.no_grad():
        for passage in text.passages:
            whole(passage[None])
    largest = sum(tensor.numel() for name, tensor in whole.state_dict().items() if "layers.0." in name) * 4
    said: list[str] = []
    with metered() as meter:
        for found in feed_forwards(dense, text, said.append):
            torch.testing.assert_close(found.inputs, torch.cat(entered[found.layer]), rtol=1e-4, atol=1e-5)
    assert meter.peak < 1.3 * max(largest, 260 * 32 * 4)
    assert meter.alive == 0
    assert len(said) == dense.num_layers and text.names == ("code", "prose")
    assert len(text.domain_ids()) == len(text) == sum(map(len, text.passages))


def test_text_that_is_not_there(tmp_path: Path) -> None:
    source = open_source(dense_folder(tmp_path / "dense"))
    with pytest.raises(DataError, match=r"data path .* does not exist"):
        read_text(source, [str(tmp_path / "none")], tokens=10, sequence_length=8, held_out=0.0)
    small = open_source(dense_folder(tmp_path / "small", vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    with pytest.raises(DataError, match="the tokenizer does not fit the model: it gave the token id"):
        read_text(small, text_folder(tmp_path), tokens=100, sequence_length=8, held_out=0.0)


def test_marks_and_rates() -> None:
    layer = random_layer(hidden=20)
    domains = torch.tensor([0, 1, 1, 2, 1] * 10)
    neurons = observe(layer, domains, 3)
    many = round(MARKED * 20)
    counts = np.zeros((3, 20))
    assert torch.equal(neurons.features, layer.inputs) and torch.equal(neurons.domain_ids, domains)
    for token in range(50):
        shares = [abs(slow_hidden(layer, token, neuron)) * float(layer.down[:, neuron].norm()) for neuron in range(20)]
        active = sorted(range(20), key=lambda neuron: -shares[neuron])[:many]
        squares = [share**2 / sum(other**2 for other in shares) for share in shares]
        assert neurons.shares[token].tolist() == pytest.approx(squares, rel=1e-3, abs=1e-6)
        assert neurons.marks[token].nonzero().squeeze(1).tolist() == sorted(active)
        counts[int(domains[token]), active] += 1
    np.testing.assert_allclose(neurons.rates, counts / np.array([[10], [30], [10]]), rtol=1e-6)
    overall = counts.sum(axis=0)
    assert set(always_active(neurons, 3, "weight")) == set(np.argsort(-overall, kind="stable")[:3])
    least = neurons.rates.amin(dim=0).double().numpy()
    assert set(always_active(neurons, 3, "domain")) == set(np.argsort(-least, kind="stable")[:3])


def random_neurons(marks: Tensor, domain_ids: Tensor, **changes: Any) -> Neurons:
    count = marks.shape[1]
    domains = range(int(domain_ids.max()) + 1)
    rates = torch.stack([marks[domain_ids == domain].float().mean(dim=0) for domain in domains])
    shares = marks / marks.sum(dim=1, keepdim=True).clamp(min=1)
    parts = {"gate": torch.zeros(count, 2), "up": torch.zeros(count, 2), "features": torch.zeros(len(marks), 2)}
    parts |= {"marks": marks, "shares": shares, "domain_ids": domain_ids, "rates": rates}
    return Neurons(**{**parts, **changes})


@pytest.mark.parametrize("criterion", ["routed", "coactivation", "weight", "domain"])
def test_each_criterion_finds_its_groups(criterion: str) -> None:
    """Four groups of five neurons: of one direction, active for one domain, at the same tokens of it."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(20) // 5)[torch.randperm(20, generator=generator)]
    domain_ids = torch.arange(80) // 40
    burst = torch.arange(80) // 20  # the group that is active for a token
    marks = burst[:, None] == truth[None, :]
    marks[::7] ^= torch.rand(marks[::7].shape, generator=generator) < 0.1
    directions = torch.randn(4, 16, generator=generator)
    gate, up = ((directions[truth] + 0.05 * torch.randn(20, 16, generator=generator)) for _ in range(2))
    features = torch.eye(4)[burst] + 0.1 * torch.randn(80, 4, generator=generator)
    neurons = random_neurons(marks, domain_ids, gate=gate, up=up, features=features)
    labels = torch.from_numpy(CRITERIA.get(criterion)(neurons, 4, 1, 0))
    assert torch.bincount(labels).tolist() == [5] * 4
    assert all(len(set(truth[labels == expert].tolist())) == 1 for expert in range(4))
    if criterion == "domain":  # experts stand in the order of the domains
        assert [int(truth[labels == expert][0]) // 2 for expert in range(4)] == [0, 0, 1, 1]
    chosen = np.flatnonzero(truth.numpy() < 2)
    part = neurons.of(chosen)
    assert torch.equal(part.marks, marks[:, torch.from_numpy(chosen)]) and part.gate.shape == (10, 16)


def kept(neurons: Neurons, labels: Tensor, top_k: int) -> float:
    """What the gate for these experts keeps of the neurons' shares, token by token."""
    experts = int(labels.max()) + 1
    wanted = torch.stack([neurons.shares[:, labels == expert].sum(dim=1) for expert in range(experts)], dim=1)
    logits = GateFit(neurons.features).gate(wanted, top_k).logits(neurons.features)
    best = [sorted(range(experts), key=lambda expert: -float(row[expert]))[:top_k] for row in logits]
    return sum(float(wanted[token, expert]) for token, row in enumerate(best) for expert in row)


def test_routed_experts_keep_more_than_those_it_begins_with_and_than_coactivation() -> None:
    layer = random_layer(tokens=400, width=8, hidden=32)
    neurons = observe(layer, torch.zeros(400, dtype=torch.int64), 1)
    labels = {name: torch.from_numpy(CRITERIA.get(name)(neurons, 8, 4, 0)) for name in ("routed", "coactivation")}
    assert torch.bincount(labels["routed"]).tolist() == [4] * 8
    first = torch.empty(32, dtype=torch.int64)
    first[neurons.shares.mean(dim=0).argsort(descending=True, stable=True)] = torch.arange(32) // 4
    ours = kept(neurons, labels["routed"], 4)
    assert ours > kept(neurons, first, 4)
    assert ours > kept(neurons, labels["coactivation"], 4)


def test_routed_experts_follow_the_routes_of_the_layers_before() -> None:
    """Those before want expert 0 for the first tokens, 1 for the next ones: the neurons of these tokens go there."""
    burst = torch.arange(60) // 20
    marks = burst[:, None] == torch.tensor([2, 0, 1, 2, 1, 0])[None, :]
    neurons = random_neurons(marks, torch.zeros(60, dtype=torch.int64), features=torch.eye(3)[burst])
    wanted = replace(neurons, wanted=10 * torch.eye(3)[burst])
    assert CRITERIA.get("routed")(wanted, 3, 1, 0).tolist() == [2, 0, 1, 2, 1, 0]


def test_domains_that_do_not_divide_the_experts() -> None:
    marks = torch.rand(90, 25, generator=torch.Generator().manual_seed(0)) < 0.3
    labels = CRITERIA.get("domain")(random_neurons(marks, torch.arange(90) % 3), 5, 2, 0)
    assert np.bincount(labels).tolist() == [5] * 5


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_squares_that_are_not_finite_are_refused(size: float) -> None:
    layer = random_layer()
    layer.down *= size
    shared, members, choice = torch.tensor([1]), torch.tensor([[0, 2], [3, 11]]), torch.randn(50, 2)
    with pytest.raises(CheckpointError, match=r"the square of the neurons' output of layer 1 \(.*\) is not finite"):
        observe(layer, torch.zeros(50, dtype=torch.int64), 1)
    with pytest.raises(CheckpointError, match=r"the square of an expert's output of layer 1 .* too large for float32"):
        contributions(layer, members)
    with pytest.raises(CheckpointError, match="the square of the feed-forward's output of layer 1"):
        explained(layer, shared, members, choice, 1)


def test_contributions_and_what_a_choice_explains() -> None:
    layer = random_layer()
    shared, members = torch.tensor([1, 7, 9, 10]), torch.tensor([[0, 2], [3, 11], [4, 5], [6, 8]])
    target = contributions(layer, members)
    choice = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for token in range(50):
        hidden = [slow_hidden(layer, token, neuron) for neuron in range(12)]

        def output(chosen: list[int], hidden: list[float] = hidden) -> Tensor:
            return sum((hidden[n] * layer.down[:, n].double() for n in chosen), torch.zeros(8, dtype=torch.float64))

        norms = [float(output(own.tolist()).norm()) for own in members]
        assert target[token].tolist() == pytest.approx([4 * norm / sum(norms) for norm in norms], rel=1e-4)
        best = sorted(range(4), key=lambda expert: -float(choice[token, expert]))[:2]
        kept = [*shared.tolist(), *(n for expert in best for n in members[expert].tolist())]
        whole = output(list(range(12)))
        total += float((whole - output(kept)).square().sum() / whole.square().sum())
    assert explained(layer, shared, members, choice, 2) == pytest.approx(1 - total / 50, rel=1e-3, abs=1e-4)
    assert explained(layer, shared, members, choice, 4) == pytest.approx(1.0, abs=1e-6)


def test_the_gate_is_least_squares_with_a_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(200, 6, generator=generator), torch.randn(200, 3, generator=generator) + 2
    x[:, 0] *= 5
    gate = GateFit(x).gate(wanted, 2)
    y64 = np.array([[float(value != row.min()) for value in row] for row in wanted])
    x64 = x.double().numpy()
    centered = x64 - x64.mean(axis=0)
    ridge = 1e-2 * (centered**2).mean(axis=0).mean()
    weight = np.linalg.inv(centered.T @ centered + 200 * ridge * np.eye(6)) @ centered.T @ (y64 - y64.mean(axis=0))
    expected = centered @ weight + y64.mean(axis=0)
    expected = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(gate.logits(x).numpy(), expected, rtol=1e-4, atol=1e-4)
    flat = GateFit(torch.zeros(20, 6)).gate(torch.ones(20, 3), 1)
    assert torch.isfinite(flat.weight).all() and torch.isfinite(flat.bias).all()


def test_experts_of_a_layer_take_the_places_of_those_that_are_wanted_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(300, 5, generator=generator)
    places = torch.tensor([3, 0, 4, 1, 2])
    layer = (common + 0.3 * torch.randn(300, 5, generator=generator))[:, places] * 7 + 3
    found = torch.from_numpy(align(layer, common))
    assert torch.equal(places[found], torch.arange(5))
