"""Upcycled models: equal to the dense one at the start, unless asked otherwise, and then as far from it as is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.convert.models import SIZES, dense_folder, dense_model, save
from tests.convert.test_split_memory import Allocated

from moesaic.convert.banks import FreshRouters
from moesaic.convert.meter import metered
from moesaic.convert.upcycling import CopyChange, UpcycleSettings, upcycle
from moesaic.errors import CheckpointError, ConfigError, UnsupportedError
from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.load import load_model

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_equal_to_the_dense_model(tmp_path: Path, family: str) -> None:
    dense = dense_model(family, tie_word_embeddings=family == "llama")
    made = upcycle(save(dense, tmp_path / "dense"), tmp_path / "moe", UpcycleSettings(num_experts=4))
    moe, _ = load_model(tmp_path / "moe")
    assert isinstance(moe, MoesaicForCausalLM)
    assert relative(logits(moe), logits(dense)) < 1e-5
    assert max(made.distance) < 1e-5 and len(made.distance) == 2
    assert made.dense_parameters == 2 * 3 * 32 * 48 and made.active_parameters == 2 * made.dense_parameters
    assert moe.config.num_experts == 4 and moe.config.balancing == {"load_balancing": 0.01}
    assert made.written.parameters == sum(tensor.numel() for tensor in load_state(tmp_path / "moe").values())


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_copies_differ_and_are_exact_in_bfloat16(tmp_path: Path) -> None:
    dense = dense_model().to(torch.bfloat16)
    upcycle(save(dense, tmp_path / "dense"), tmp_path / "moe", UpcycleSettings(num_experts=3, top_k=3))
    state = load_state(tmp_path / "moe")
    up, down = state["model.layers.0.mlp.experts.up"], state["model.layers.0.mlp.experts.down"]
    assert up.dtype == torch.bfloat16 and up.shape == (3, 96, 32) and down.shape == (3, 32, 48)
    mlp = dense.model.layers[0].mlp.requires_grad_(False)
    for expert in range(3):
        for neuron in range(48):  # every neuron of a copy is one of the dense model's, its up row times c
            gate, up_row, column = up[expert, neuron], up[expert, 48 + neuron], down[expert, :, neuron]
            (match,) = (mlp.gate_proj.weight == gate).all(dim=1).nonzero().squeeze(1).tolist()
            c = float((up_row.float() / mlp.up_proj.weight[match].float()).mean())
            assert c in (0.5, 1.0, 2.0)
            assert torch.equal(up_row, mlp.up_proj.weight[match] * c)
            assert torch.equal(column, mlp.down_proj.weight[:, match] / c)
    assert not torch.equal(up[0], up[1]) and not torch.equal(up[1], up[2])


def test_without_perturbation_they_are_the_same(tmp_path: Path) -> None:
    dense = dense_model()
    upcycle(save(dense, tmp_path / "dense"), tmp_path / "moe", UpcycleSettings(num_experts=2, perturb=False))
    state = load_state(tmp_path / "moe")
    mlp = dense.model.layers[1].mlp
    for expert in range(2):
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert torch.equal(state["model.layers.1.mlp.experts.up"][expert], both)
        assert torch.equal(state["model.layers.1.mlp.experts.down"][expert], mlp.down_proj.weight)


def drift(folder: Path) -> float:
    """How far apart two copies are after a step of training, of the size of what they compute."""
    moe = MoesaicForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.05)
    moe.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    bank = moe.model.layers[0].mlp.experts
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (bank.activation.apply(x @ bank.up[e].t()) @ bank.down[e].t() for e in range(2))
    return relative(first, second)


def test_perturbed_copies_drift_apart_in_training(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    for perturb in (True, False):
        settings = UpcycleSettings(num_experts=2, balancing={}, perturb=perturb)
        upcycle(folder, tmp_path / str(perturb), settings)
    assert drift(tmp_path / "True") > 3 * drift(tmp_path / "False")


def reference_distance(dense: Any, folder: Path, layer: int) -> float:
    """What the experts on disk give and what the dense model gives, a token and a neuron at a time, in float64."""
    moe = MoesaicForCausalLM.from_pretrained(folder).double()
    mlp, norm = dense.double().model.layers[layer].mlp, dense.model.layers[layer].post_attention_layernorm
    from moesaic.convert.seeds import generator

    x = torch.randn(64, 32, generator=generator(0, "probe", layer)).double()
    apart = whole = 0.0
    with torch.no_grad():
        for token in x:
            token = token / token.square().mean().sqrt() * norm.weight
            wanted = mlp(token)
            logit = moe.model.layers[layer].mlp.router.weight @ token
            chosen = logit.softmax(0).topk(2)
            got = torch.zeros_like(wanted)
            for weight, expert in zip(chosen.values / chosen.values.sum(), chosen.indices.tolist(), strict=True):
                up, down = (
                    bank[expert]
                    for bank in (moe.model.layers[layer].mlp.experts.up, moe.model.layers[layer].mlp.experts.down)
                )
                for neuron in range(48):
                    gate = token @ up[neuron]
                    got += weight * (gate * torch.sigmoid(gate) * (token @ up[48 + neuron])) * down[:, neuron]
            apart += float((got - wanted).square().sum())
            whole += float(wanted.square().sum())
    return (apart / whole) ** 0.5


@pytest.mark.parametrize("change", [{"drop": 0.5}, {"noise": 0.1}, {"drop": 0.25, "noise": 0.05, "perturb": False}])
def test_the_distance_is_what_is_said(tmp_path: Path, change: dict[str, Any]) -> None:
    said: list[str] = []
    dense = dense_model()
    settings = UpcycleSettings(num_experts=3, **change)
    made = upcycle(save(dense, tmp_path / "dense"), tmp_path / "moe", settings, say=said.append)
    for layer in range(2):
        assert made.distance[layer] == pytest.approx(reference_distance(dense, tmp_path / "moe", layer), rel=1e-4)
        assert made.distance[layer] > 0.01
    assert said[-1].startswith("distance of the layers' outputs from the dense ones: ")


def test_dropped_neurons_are_drawn_like_those_they_replace() -> None:
    settings = UpcycleSettings(drop=0.3, perturb=False)
    weight = torch.randn(200, 64) * 3 + 1
    change = CopyChange.of(settings, 0, 0, 200)
    into = torch.empty(400, 64)
    change.up(weight, weight, into)
    dropped = set(change.dropped_S.tolist())
    assert len(dropped) == 60
    for neuron in range(200):
        assert torch.equal(into[neuron], weight[neuron]) == (neuron not in dropped)
    old, new = weight[change.dropped_S], into[change.dropped_S]
    assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.2)
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.05)
    down = torch.empty(64, 200)
    change.down(weight.t(), down)  # the same neurons in all three matrices
    assert {n for n in range(200) if not torch.equal(down[:, n], weight[n])} == dropped
    others = CopyChange.of(settings, 0, 1, 200).dropped_S
    assert set(others.tolist()) != dropped


def test_one_expert_a_token_with_unit_weights(tmp_path: Path) -> None:
    dense = dense_model()
    settings = UpcycleSettings(num_experts=4, top_k=1, router="unit_topk")
    made = upcycle(save(dense, tmp_path / "dense"), tmp_path / "moe", settings)
    moe, _ = load_model(tmp_path / "moe")
    assert relative(logits(moe), logits(dense)) < 1e-5
    assert made.active_parameters == made.dense_parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1}, "num_experts is 1: it must be a whole number of at least 2"),
        ({"num_experts": 4, "top_k": 5}, "top_k is 5: it must be at least 1 and at most num_experts = 4"),
        ({"drop": 1.5}, "drop is 1.5: it must be a share from 0 to 1"),
        ({"noise": -1.0}, "noise is -1.0: it must be finite and at least 0"),
        ({"router": "softmx"}, "unknown router 'softmx': did you mean 'softmax_topk'"),
        ({"router_options": {"normalize": False}}, "the router 'softmax_topk' do not sum to 1"),
        ({"router": "unit_topk"}, "the router 'unit_topk' do not sum to 1"),
        ({"router": "hash"}, "the router 'hash' do not sum to 1"),
        ({"router": "recurrent"}, "the router 'recurrent' shares parts between layers"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpcycleSettings(**settings)


def test_unknown_balancing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown balancer"):
        upcycle(dense_folder(tmp_path / "dense"), tmp_path / "moe", UpcycleSettings(balancing={"loadbalancing": 1.0}))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    upcycle(dense_folder(tmp_path / "dense"), tmp_path / "moe", UpcycleSettings(num_experts=2))
    with pytest.raises(UnsupportedError, match="is a mixture of experts already"):
        upcycle(tmp_path / "moe", tmp_path / "again", UpcycleSettings())
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(num_experts=2))


def test_an_interrupted_start_goes_on_to_the_same_model(tmp_path: Path) -> None:
    folder, settings = dense_folder(tmp_path / "dense"), UpcycleSettings(num_experts=3, drop=0.5)
    upcycle(folder, tmp_path / "whole", settings, shard_bytes=20_000)

    def stop(line: str) -> None:
        if "(4 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(folder, tmp_path / "moe", settings, say=stop, shard_bytes=20_000)
    with pytest.raises(CheckpointError, match="unfinished conversion with other settings"):
        upcycle(folder, tmp_path / "moe", UpcycleSettings(num_experts=3), shard_bytes=20_000)
    made = upcycle(folder, tmp_path / "moe", settings, shard_bytes=20_000)
    assert made.written.resumed == 3
    whole, resumed = load_state(tmp_path / "whole"), load_state(tmp_path / "moe")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()


def test_only_the_same_model_is_gone_on_with(tmp_path: Path) -> None:
    model, settings = dense_model(), UpcycleSettings(num_experts=3)
    folder, out = save(model, tmp_path / "dense"), tmp_path / "moe"

    def stop(line: str) -> None:
        if "(4 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(folder, out, settings, say=stop, shard_bytes=20_000)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.01
    other = save(model, tmp_path / "other")  # fine-tuned, with the embedding that it had
    with pytest.raises(CheckpointError, match=r"unfinished conversion with other settings \(model: 'v1:.*remove"):
        upcycle(other, out, settings, shard_bytes=20_000)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert upcycle(copy, out, settings, shard_bytes=20_000).written.resumed == 3


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_values_that_are_not_finite_are_told(tmp_path: Path, part: str) -> None:
    model = dense_model()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{part}").weight[3, 3] = float("inf")
    with pytest.raises(CheckpointError, match=rf"model.layers.1.{part}.weight holds values that are not finite"):
        upcycle(save(model, tmp_path / "dense"), tmp_path / "moe", UpcycleSettings(num_experts=2))


@pytest.mark.parametrize(("drop", "neurons"), [(0.29, 29), (0.999, 99), (0.004, 0), (1.0, 100)])
def test_the_share_that_is_drawn_anew_is_rounded_down(drop: float, neurons: int) -> None:
    assert 0.29 * 100 < 29
    assert len(CopyChange.of(UpcycleSettings(drop=drop), 0, 0, 100).dropped_S) == neurons


def test_memory_stays_below_a_layer_and_a_shard(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense", num_hidden_layers=6)
    layer, shard = 4 * 4 * 3 * 32 * 48, 4 * 4 * 2 * 32 * 48  # of the model made; its largest tensor
    with metered() as meter:
        upcycle(folder, tmp_path / "moe", UpcycleSettings(num_experts=4), shard_bytes=shard)
    assert SIZES["vocab_size"] * 32 * 4 < shard < meter.peak < 1.3 * layer + shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{}, {"drop": 0.5, "noise": 0.1}], ids=str)
def test_memory_of_every_intermediate_result(tmp_path: Path, change: dict[str, float], dtype: torch.dtype) -> None:
    """By a counter that sees all that is computed, with as few copies as there can be."""
    dense = dense_model(hidden_size=256, intermediate_size=1024, head_dim=64).to(dtype)
    folder, copies = save(dense, tmp_path / "dense"), 2 * 256 * 1024 * dtype.itemsize
    with Allocated() as everything:
        upcycle(folder, tmp_path / "moe", UpcycleSettings(num_experts=2, **change), shard_bytes=2 * copies)
    assert 2 * copies < everything.meter.peak < 1.3 * 3 * copies + 2 * copies


def test_fresh_routers_are_the_same_whenever_asked_for() -> None:
    routers = FreshRouters("softmax_topk", {}, 4, 2, 0.02, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights = [routers.build(layer, 32).weight for layer in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert float(weights[0].detach().std()) == pytest.approx(0.02, rel=0.3)
    assert torch.equal(torch.get_rng_state(), before)
