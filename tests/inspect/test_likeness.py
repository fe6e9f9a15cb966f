"""How alike experts are, against loops over tokens and experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.convert.mixtures import mixture
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.data import Document
from moesaic.experts import ExpertBank
from moesaic.inspect import collect, likeness


def bank(experts: int = 4, d_model: int = 6, d_ff: int = 5) -> ExpertBank:
    torch.manual_seed(0)
    made = ExpertBank(d_model, d_ff, experts, bias=True)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def output(of: ExpertBank, expert: int, x: torch.Tensor) -> np.ndarray:
    assert of.up_bias is not None and of.down_bias is not None
    gate, up = (of.up[expert].double() @ x.double() + of.up_bias[expert].double()).chunk(2)
    inner = F.silu(gate) * up
    return (of.down[expert].double() @ inner + of.down_bias[expert].double()).detach().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_output_cosines() -> None:
    experts, x = bank(), torch.randn(7, 6)
    found = likeness.output_cosines(x, [experts.weights()])
    for i in range(4):
        for j in range(4):
            expected = np.mean([cosine(output(experts, i, row), output(experts, j, row)) for row in x])
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-5)


def test_banks_of_unequal_width_are_compared_too() -> None:
    wide, narrow = bank(2, d_ff=9), bank(3, d_ff=2)
    x = torch.randn(5, 6)
    found = likeness.output_cosines(x, [wide.weights(), narrow.weights()])
    assert found.shape == (5, 5)
    expected = np.mean([cosine(output(wide, 1, row), output(narrow, 2, row)) for row in x])
    assert float(found[1, 4]) == pytest.approx(expected, abs=1e-5)


def test_weight_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "_CHUNK", 7)
    experts = bank()
    found = likeness.weight_cosines(experts.weights())
    vectors = [torch.cat([experts.up[e].flatten(), experts.down[e].flatten()]).double() for e in range(4)]
    for i in range(4):
        for j in range(4):
            expected = cosine(vectors[i].detach().numpy(), vectors[j].detach().numpy())
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-5)


def test_zeros_are_like_nothing() -> None:
    assert likeness.cosines([torch.tensor([[1.0, 0.0], [0.0, 0.0]])]).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("family", ["mixtral", "moesaic", "gpt_oss"])
def test_a_trace_knows_the_likeness_of_its_layers(family: str) -> None:
    from tests.convert.models import byte_tokenizer

    model = mixture(family, num_hidden_layers=2)
    twins(model)
    documents = [Document("a", "one", "some words and some more words " * 20)]
    trace = collect(model, byte_tokenizer(), documents, name="m", max_tokens=128, sequence_length=64)
    for layer in trace.layers:
        assert set(layer.similarity) == {"outputs", "weights"}
        outputs, weights = (layer.similarity[name] for name in ("outputs", "weights"))
        assert np.allclose(np.diag(outputs), 1, atol=1e-5)
        assert outputs[1, 4] == pytest.approx(1, abs=1e-5)
        assert weights[1, 4] == pytest.approx(1, abs=1e-5)
        assert outputs[0, 1] < 0.99


def twins(model: PreTrainedModel) -> None:
    """Expert 4 of each layer becomes a copy of expert 1."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data[4] = parameter.data[1]
