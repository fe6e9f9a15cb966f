"""Rerouting at test time: the vectors are those of an optimization written anew, and nothing else changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.hf.test_reroute import OURS, build, ours
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.hf import Rewirer, Rewiring
from moesaic.hf.generation import Sampling, generate
from moesaic.routing import Routing

CONTEXT = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(1))


class BiasedGate(nn.Module):
    """A gate of Mixtral's kind (or Qwen3-MoE's, or ours) written out, with a bias."""

    def __init__(self, gate: nn.Module, ours: bool) -> None:
        super().__init__()
        self.register_buffer("matrix", gate.get_parameter("weight").detach().clone())
        self.bias = nn.Parameter(torch.zeros(len(self.matrix)))
        self.ours, self.normalized = ours, getattr(gate, "norm_topk_prob", True)
        self.top_k = int(gate.top_k)
        self.reads_context, self.num_ffn = False, None
        self.logits, self.ids = torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor, top_k: int | None = None) -> Any:
        logits = x.reshape(-1, x.shape[-1]) @ self.matrix.T + self.bias
        exponents = (logits - logits.max(dim=-1, keepdim=True).values).exp()
        p = exponents / exponents.sum(dim=-1, keepdim=True)
        ids = p.argsort(dim=-1, descending=True)[:, : self.top_k]
        weights = torch.stack([row[chosen] for row, chosen in zip(p, ids, strict=True)])
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        self.logits, self.ids = logits.detach(), ids
        return Routing(ids, weights, p, logits) if self.ours else (logits, weights, ids)


def confidence(gate: BiasedGate) -> float:
    total, count = 0.0, 0
    for row, ids in zip(gate.logits.double().tolist(), gate.ids.tolist(), strict=True):
        whole = sum(math.exp(value) for value in row)
        for expert in ids:
            total -= math.log(math.exp(row[expert]) / whole)
            count += 1
    return total / count


def reference(model: nn.Module, contexts: list[Tensor], settings: Rewiring) -> dict[str, Tensor]:
    """The vectors by another way: gates with a bias in place of the model's, and Adam written out."""
    model = copy.deepcopy(model).requires_grad_(False)
    gates: dict[str, BiasedGate] = {}
    for name, module in list(model.named_modules()):
        if name.endswith((".gate", ".router")):
            gates[name] = BiasedGate(module, isinstance(module, moesaic.routing.Router))
            holder, _, key = name.rpartition(".")
            setattr(model.get_submodule(holder), key, gates[name])
    for ids in contexts:
        chosen: list[str] = []
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        for step in range(1, settings.steps + 1):
            logits = model(ids).logits[0].log_softmax(dim=-1)
            loss = -sum(logits[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1)) / (ids.shape[1] - 1)
            if step == 1:
                count = math.ceil(settings.layers * len(gates))
                chosen = sorted(gates, key=lambda name: -confidence(gates[name]))[:count]
                moments = {name: (torch.zeros(8), torch.zeros(8)) for name in chosen}
            gradients = torch.autograd.grad(loss, [gates[name].bias for name in chosen])
            for name, gradient in zip(chosen, gradients, strict=True):
                first, second = moments[name]
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                moments[name] = first, second
                size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                gates[name].bias.data -= settings.learning_rate * size
    return {name: gate.bias.detach() for name, gate in gates.items()}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: ours(num_hidden_layers=3),
    "mixtral": lambda: build("mixtral", num_hidden_layers=3),
    "olmoe": lambda: build("olmoe", num_hidden_layers=3),
    "qwen3_moe": lambda: build("qwen3_moe", num_hidden_layers=3),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("layers", [0.3, 0.5, 1.0])
def test_the_vectors_are_those_of_an_optimization_written_anew(model: nn.Module, layers: float) -> None:
    """Twice, on a context that has grown: vectors go on, Adam starts again, the layers are chosen again."""
    settings = Rewiring(steps=3, learning_rate=0.02, layers=layers)
    contexts = [CONTEXT[:, :15], CONTEXT]
    wanted = reference(model, contexts, settings)
    with Rewirer(model, settings) as rewirer:
        done = [rewirer.optimize(ids) for ids in contexts]
        got = rewirer.vectors
    assert got.keys() == wanted.keys()
    assert [len(each.layers) for each in done] == [math.ceil(layers * 3)] * 2
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0.02, atol=5e-4)
        assert bool(got[name].any()) == any(name in each.layers for each in done)


def test_gpt_oss_is_moved_as_its_own_bias_would_be() -> None:
    """One step: the vector goes where a step of torch's Adam moves the gate's own bias."""
    model = build("gpt_oss", num_hidden_layers=1)
    other = copy.deepcopy(model).requires_grad_(False)
    bias = other.get_parameter("model.layers.0.mlp.router.bias").requires_grad_(True)
    before = bias.detach().clone()
    optimizer = torch.optim.Adam([bias], lr=0.05)
    other(CONTEXT, labels=CONTEXT).loss.backward()
    optimizer.step()
    with Rewirer(model, Rewiring(steps=1)) as rewirer:
        rewirer.optimize(CONTEXT)
    torch.testing.assert_close(rewirer.vectors["model.layers.0.mlp.router"], bias.detach() - before)


def test_the_loss_on_the_context_falls_and_the_model_comes_back(model: nn.Module) -> None:
    model.train()
    next(model.parameters()).requires_grad_(False)
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    before, state = model(CONTEXT).logits.detach(), copy.deepcopy(model.state_dict())
    model.train()
    with Rewirer(model, Rewiring(steps=12)) as rewirer:
        done = rewirer.optimize(CONTEXT)
        assert done.tokens == 24
        assert len(done.losses) == 12
        assert done.losses[-1] < done.losses[0] - 1e-3
        assert all(module.training for module in model.modules())
        model.eval()
        during = model(CONTEXT).logits.detach()
        loss = nn.functional.cross_entropy(during[0, :-1], CONTEXT[0, 1:])
        assert loss < done.losses[0]
        assert str(model.state_dict().keys()) == str(state.keys())
    assert torch.equal(model(CONTEXT).logits, before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == flags


def test_an_error_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before = model(CONTEXT).logits.detach()
    with pytest.raises(IndexError), Rewirer(model) as rewirer:
        rewirer.optimize(CONTEXT + 1000)
    assert torch.equal(model(CONTEXT).logits, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_context_without_a_next_token_moves_nothing(model: nn.Module) -> None:
    with Rewirer(model) as rewirer:
        done = rewirer.optimize(CONTEXT[:, :1])
    assert (done.losses, done.layers) == ([], [])
    assert not any(vector.any() for vector in rewirer.vectors.values())


def test_only_the_last_tokens_are_read(model: nn.Module) -> None:
    settings = Rewiring(steps=2, max_tokens=10)
    with Rewirer(model, settings) as rewirer:
        assert rewirer.optimize(CONTEXT).tokens == 10
    with Rewirer(model, settings) as other:
        other.optimize(CONTEXT[:, -10:])
    assert all(torch.equal(other.vectors[name], vector) for name, vector in rewirer.vectors.items())


def test_under_inference_mode_and_on_native_linears(model: nn.Module) -> None:
    with Rewirer(model, Rewiring(steps=2)) as wanted:
        wanted.optimize(CONTEXT)
    moesaic.freeze(model)
    with torch.inference_mode(), Rewirer(model, Rewiring(steps=2)) as rewirer:
        rewirer.optimize(CONTEXT.clone())
        shifted = model(CONTEXT).logits
    for name, vector in wanted.vectors.items():
        torch.testing.assert_close(rewirer.vectors[name], vector, rtol=1e-2, atol=1e-4)
    assert not torch.allclose(model(CONTEXT).logits, shifted)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_models_too(format: str) -> None:
    for model in (ours(), build("qwen3_moe")):
        moesaic.quantize(model, format)
        with Rewirer(model, Rewiring(steps=10, layers=1.0)) as rewirer:
            losses = rewirer.optimize(CONTEXT).losses
        assert losses[-1] < losses[0]


def test_a_rerouted_model_too() -> None:
    for model in (ours(), build("olmoe")):
        before = model(CONTEXT).logits.detach()
        with (
            moesaic.reroute(model, "expert_skipping", top_k=4, ratio=0.8),
            Rewirer(model, Rewiring(steps=10)) as rewirer,
        ):
            losses = rewirer.optimize(CONTEXT).losses
            assert losses[-1] < losses[0]
        assert torch.equal(model(CONTEXT).logits, before)


@pytest.mark.parametrize("kind", OURS)
def test_ours_of_every_form(kind: str) -> None:
    """Each router with a gate has a vector; layers that take another one's routes have none."""
    model = ours(num_hidden_layers=3, **OURS[kind])
    before = model(CONTEXT).logits.detach()
    with Rewirer(model, Rewiring(steps=10, layers=1.0)) as rewirer:
        done = rewirer.optimize(CONTEXT)
        assert min(done.losses[1:]) < done.losses[0]
        assert len(rewirer.vectors) == {"chain": 6, "pre-gated stack": 1}.get(kind, 3)
        assert all(vector.any() for vector in rewirer.vectors.values())
    assert torch.equal(model(CONTEXT).logits, before)


def test_bfloat16() -> None:
    for model in (ours().bfloat16(), build("qwen3_moe").bfloat16()):
        with Rewirer(model, Rewiring(steps=10)) as rewirer:
            losses = rewirer.optimize(CONTEXT).losses
        assert losses[-1] < losses[0]
        assert all(vector.dtype == torch.float32 for vector in rewirer.vectors.values())


class Words:
    """A tokenizer of one character a token."""

    bos_token_id = eos_token_id = pad_token_id = 2

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        return "".join(chr(32 + int(i) % 90) for i in ids if int(i) != 2)


GREEDY = Sampling(max_new_tokens=11, temperature=0)


@pytest.mark.parametrize(("interval", "times"), [(0, 1), (4, 3), (11, 1), (100, 1), (1, 11)])
def test_generate_optimizes_at_intervals_and_streams_all(model: nn.Module, interval: int, times: int) -> None:
    model.generation_config.eos_token_id = None
    pieces: list[str] = []
    settings = Rewiring(steps=2, learning_rate=0.2, interval=interval)
    made = generate(model, Words(), "a context", GREEDY, on_text=pieces.append, rewire=settings)
    assert made.rewired is not None
    assert [each.tokens for each in made.rewired] == [9 + interval * i for i in range(times)]
    assert (made.new_tokens, made.finish_reason) == (11, "length")
    assert "".join(pieces) == made.text
    plain = generate(model, Words(), "a context", GREEDY)
    assert plain.rewired is None
    assert plain.text != made.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_that_move_nothing_give_the_same_text(model: nn.Module, temperature: float) -> None:
    """Also when sampling: the pieces draw the numbers that one call would draw."""
    model.generation_config.eos_token_id = None
    sampling = Sampling(max_new_tokens=11, temperature=temperature)
    plain = generate(model, Words(), "a context", sampling)
    made = generate(model, Words(), "a context", sampling, rewire=Rewiring(steps=1, learning_rate=1e-12, interval=3))
    assert made.text == plain.text


def test_an_end_of_text_ends_it(model: nn.Module) -> None:
    """Whatever the first new token is, it is one of these ends: there is nothing left to optimize for."""
    model.generation_config.eos_token_id = list(range(128))
    made = generate(model, Words(), "a context", GREEDY, rewire=Rewiring(steps=1, interval=3))
    assert (made.new_tokens, made.finish_reason) == (1, "stop")
    assert made.rewired is not None
    assert len(made.rewired) == 1


def test_refusals() -> None:
    for settings, message in [
        ({"steps": 0}, "steps of the rewiring is 0: it must be a whole number, at least 1"),
        ({"learning_rate": 0.0}, "learning_rate of the rewiring is 0.0: it must be above 0"),
        ({"interval": -1}, "interval of the rewiring is -1"),
        ({"layers": 0.0}, "layers of the rewiring is 0.0: it must be above 0 and at most 1"),
        ({"layers": 1.5}, "layers of the rewiring"),
        ({"max_tokens": 1}, "max_tokens of the rewiring is 1: it must be a whole number, at least 2"),
        ({"steps": 1.5}, "steps of the rewiring is 1.5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Rewiring(**settings)
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no MoE layer with a gate"):
        generate(dense, Words(), "a context", GREEDY, rewire=Rewiring())
