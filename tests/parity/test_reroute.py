"""``reroute`` on every gate of the installed transformers: its rule is found out, or it is refused in one line."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.parity.experts_classes import NUM_EXPERTS, TinyConfig, sources
from tests.parity.test_models import INSTALLED, MODELS, config_of, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import moesaic
from moesaic.errors import UnsupportedError
from moesaic.hf import Rewirer, Rewiring
from moesaic.hf.gates import call_gate, find_gates, gate_matrix, gate_rule

# Gates that need more than features (token ids, the layer before), or return more than logits, weights and ids.
# Before 5.18 Jamba's was a linear layer, whose block chose.
REFUSED = {"Linear", "DeepseekV4HashRouter", "InklingTopkRouter", "ZayaRouter"}
# A gate that wants its tokens as sequences.
SEQUENCES = {"AfmoeTokenChoiceRouter"}
SLOTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


class BlockConfig(TinyConfig):
    """Two slots, two groups; and gates keep it, which are copied."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        value = super().__getattr__(name)
        if name in SLOTS and isinstance(value, int):
            return 2
        return {"n_group": 2, "topk_group": 1, "enable_moe_block": True}.get(name, value)


def block_classes() -> Iterator[tuple[str, str]]:
    """Modules, and the classes in them that call experts."""
    for module, text in sources().items():
        if "@use_experts_implementation" in text:
            for body in re.split(r"\n(?=class )", text):
                if "self.experts(" in body and (name := re.match(r"class (\w+)", body)):
                    yield module, name[1]


def build(module: str, name: str) -> nn.Module:
    """A block under a parent, with random parameters; from the first configuration that fits."""
    home = importlib.import_module(module)
    configs = [c for c in vars(home).values() if isinstance(c, type) and issubclass(c, PreTrainedConfig)]
    failures = []
    for config in sorted(configs, key=lambda c: "Text" not in c.__name__):
        needed = len(inspect.signature(getattr(home, name).__init__).parameters) - 2
        try:
            parent = nn.ModuleDict({"block": getattr(home, name)(BlockConfig(config()), *[0] * needed)})
        except Exception as error:  # a configuration of another part of the model
            failures.append(f"{config.__name__}: {error}")
            continue
        for tensor in [*parent.parameters(), *parent.buffers()]:
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=0.3)
        return parent.eval()
    raise AssertionError(f"no configuration builds {name}: {failures}")


# Blocks whose constructors want other things than a configuration and numbers.
ELSEWHERE = {"Qwen3OmniMoeTalkerTextSparseMoeBlock"}
BLOCKS = [pair for pair in block_classes() if pair[1] not in ELSEWHERE]


@pytest.mark.parametrize(("module", "name"), BLOCKS, ids=[name for _, name in BLOCKS])
def test_every_gate_is_understood_or_refused(module: str, name: str) -> None:
    """Rerouted by the rule that was found out, with all experts or two, a gate says what it said before."""
    torch.manual_seed(0)
    parent = build(module, name)
    gates = find_gates(parent)
    kinds = {type(gate.module).__name__ for gate in gates}
    if kinds & REFUSED:
        with pytest.raises(UnsupportedError, match="supported are gates that return"):
            moesaic.reroute(parent, "softmax_topk")
        return
    if not gates:
        pytest.skip(f"{name} holds its experts outside of transformers' interface")
    rule = gate_rule(gates[0])
    matrix = gate_matrix(gates[0], rule.num_experts)
    assert matrix is not None
    x = torch.randn(7, matrix.shape[1])
    x = x[None] if kinds & SEQUENCES else x
    said = call_gate(gates[0], gates[0].module, x)
    logits, weights, ids = (said[place] for place in rule.order)
    assert rule.num_experts == logits.shape[-1]
    assert ids.shape == (7, rule.top_k)
    if rule.normalize:
        torch.testing.assert_close(total(weights, ids, rule.expert_scale), torch.full((7,), rule.scale))
    with moesaic.reroute(parent, "softmax_topk", top_k=1) as handle:
        rerouted = call_gate(gates[0], gates[0].module, x)
        one, best = (rerouted[place] for place in rule.order[1:])
        assert best.flatten().tolist() == logits.argmax(dim=-1).tolist()
        assert one.dtype == weights.dtype
        assert handle.experts_per_token() == 1
    again = call_gate(gates[0], gates[0].module, x)
    assert all(torch.equal(a, b) for a, b in zip(again, said, strict=True))


def total(weights_TK: Tensor, ids_TK: Tensor, expert_scale_E: Tensor | None) -> Tensor:
    return (weights_TK if expert_scale_E is None else weights_TK / expert_scale_E[ids_TK]).sum(dim=-1)


def test_most_gates_are_understood() -> None:
    assert len(BLOCKS) > 30
    assert NUM_EXPERTS > 2


@pytest.fixture(params=[kind for kind in MODELS if kind.removesuffix("_text") in INSTALLED])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(request.param)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").eval()
    for name, parameter in built.named_parameters():
        if ".experts." in name or ".gate." in name or ".router." in name:
            nn.init.normal_(parameter, std=0.2)
    if any(type(gate.module).__name__ in REFUSED for gate in find_gates(built)):
        pytest.skip("its gates are of another form in this version")
    return built


@torch.no_grad()
def test_whole_models_with_null_slots(model: PreTrainedModel) -> None:
    """Slots that are skipped: the same with ``"moesaic"`` as with ``"eager"``; and back to the bit."""
    before = copy.deepcopy(model)(tokens()).logits
    with moesaic.reroute(model, "expert_skipping", top_k=3, ratio=0.8) as handle:
        rerouted = model(tokens()).logits
        assert 1 <= handle.experts_per_token() < 3
        assert not torch.equal(rerouted, before)
        generation = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
        generated = model.generate(tokens(), **generation)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(tokens()).logits, rerouted, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(tokens(), **generation), generated)
    model.set_experts_implementation("moesaic")
    assert torch.equal(model(tokens()).logits, before)


def test_whole_models_rewired(model: PreTrainedModel) -> None:
    """The vectors move, and a gate's logits are then its own and the vector, exactly; and back to the bit."""
    with torch.no_grad():
        before = copy.deepcopy(model)(tokens()).logits
    settings = Rewiring(steps=2, layers=1.0)
    if model.config.model_type == "phimoe":  # both experts have a weight of 1, but where two are nearly as good
        with Rewirer(model, settings) as rewirer, pytest.raises(UnsupportedError, match="no gradient to follow"):
            rewirer.optimize(tokens()[:1])
        return
    with Rewirer(model, settings) as rewirer:
        done = rewirer.optimize(tokens()[:1])
        assert len(done.losses) == 2
        assert len(done.layers) == len(rewirer.vectors) > 0
        gates = find_gates(model)
        assert all(vector.any() for vector in rewirer.vectors.values())
        gate, vector = gates[0], rewirer.vectors[gates[0].name]
        matrix = gate_matrix(gate, len(vector))
        assert matrix is not None
        x = torch.randn(5, matrix.shape[1])
        with torch.no_grad():
            shifted = call_gate(gate, gate.module, x)[gate_rule(gate).order[0]]
    with torch.no_grad():
        own = call_gate(gate, gate.module, x)[gate_rule(gate).order[0]]
        torch.testing.assert_close(shifted, own + vector)
        assert torch.equal(model(tokens()).logits, before)
