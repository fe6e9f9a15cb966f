"""Each router in a language model: training, autocast, saving, recomputation, padding, generation or its refusal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf import tiny
from tests.hf.tiny import check_the_cache_changes_nothing, enable_recomputation, gradients, tokens

import moesaic
from moesaic import MoesaicForCausalLM, update_balancing
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.hf.causality import NotCausalWarning, has_been_told
from moesaic.layer import moe_layers

# Where the warning is wanted it is caught.
pytestmark = pytest.mark.filterwarnings("ignore::moesaic.hf.causality.NotCausalWarning")

FAMILY: dict[str, dict[str, Any]] = {
    "noisy": {"router": "noisy_topk", "balancing": {"importance": 0.1, "load": 0.1}},
    "cosine": {"router": "cosine", "balancing": {"cosine_load_balancing": 0.1}},
    "cosine, sigmoid": {"router": "cosine", "router_options": {"gate": "sigmoid", "normalize": True}},
    "hash": {"router": "hash"},
    "balanced hash": {"router": "hash", "router_options": {"vocab_size": 50}},
    "top-p": {
        "router": "top_p",
        "num_experts_per_tok": 4,
        "balancing": {"entropy": 0.01, "load_balancing": 0.1, "z_loss": 0.01},
    },
    "expert choice": {"router": "expert_choice", "num_experts_per_tok": 4, "balancing": {"z_loss": 0.01}},
}
CAUSAL = [name for name in FAMILY if name != "expert choice"]


def model_of(name: str, **changes: Any) -> MoesaicForCausalLM:
    model = tiny.model_of(**{**FAMILY[name], **changes})
    for layer in moe_layers(model):  # noisy top-k begins with zeros: nothing would depend on the token
        for parameter in layer.router.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", FAMILY)
class TestTraining:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_learns(self, name: str, precision: str) -> None:
        model, ids = model_of(name).train(), tokens()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        losses = []
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = model(ids, labels=ids)
            assert output.aux_loss is not None and output.aux_loss.dtype == torch.float32
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_balancing(model)
            losses.append(float(output.loss.detach()))
        assert losses[-1] < 0.8 * losses[0]
        routers = {key: p for key, p in model.named_parameters() if "router" in key}
        assert bool(routers) == ("hash" not in name)
        assert all(torch.isfinite(p).all() and not torch.equal(p, before[key]) for key, p in routers.items())

    def test_recomputed_layers_give_the_same_gradients(self, name: str) -> None:
        """Noise too: the recomputation draws what the forward drew."""
        model = model_of(name).train()
        plain = gradients(model)
        enable_recomputation(model)
        recomputed = gradients(model)
        assert (gradients(model, seed=2)["loss"] == recomputed["loss"]) == (name != "noisy")
        assert float(recomputed["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6)
        assert plain.keys() == recomputed.keys()
        for key, gradient in plain.items():
            torch.testing.assert_close(recomputed[key], gradient, rtol=1e-4, atol=1e-6)

    def test_in_half_precision(self, name: str) -> None:
        model = model_of(name).train().bfloat16()
        found = gradients(model)
        assert found["loss"] > 0
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())

    def test_several_iterations(self, name: str) -> None:
        model = model_of(name, iterations=2).train()
        found = gradients(model)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        assert all(len(layer.last_routings) == 2 for layer in moe_layers(model))

    def test_beside_experts_that_compute_nothing(self, name: str) -> None:
        model = model_of(name, zero_computation_experts={"zero": 1, "copy": 1, "constant": 1}).train()
        found = gradients(model)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        routing = moe_layers(model)[0].last_routing
        assert routing is not None and routing.num_experts == 7


@pytest.mark.parametrize("name", FAMILY)
def test_a_saved_model_comes_back(name: str, tmp_path: Path) -> None:
    model, ids = model_of(name), tokens()
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # what is drawn while loading must not matter
    loaded = MoesaicForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.config.router_options == model.config.router_options
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items() if "router" in key
    )


@pytest.mark.parametrize("name", FAMILY)
def test_a_copy_is_the_same(name: str) -> None:
    model, ids = model_of(name), tokens()
    model(ids)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", FAMILY)
def test_padding_changes_nothing(name: str) -> None:
    model, ids = model_of(name), tokens()
    pad = 3
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(ids.shape[1] + pad) >= pad).long().expand(2, -1)
    with torch.no_grad():
        wanted = model(ids)
        got = model(padded, attention_mask=mask)
    torch.testing.assert_close(got.logits[:, pad:], wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.aux_loss, wanted.aux_loss, rtol=1e-4, atol=1e-5)


class TestGeneration:
    @pytest.mark.parametrize("name", CAUSAL)
    def test_the_cache_changes_nothing(self, name: str) -> None:
        check_the_cache_changes_nothing(model_of(name), atol=1e-4)

    @pytest.mark.parametrize("name", CAUSAL)
    def test_generates(self, name: str) -> None:
        model = model_of(name)
        text = model.generate(tokens(), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert text.shape == (2, 17)
        assert torch.equal(text, model.generate(tokens(), max_new_tokens=5, do_sample=False, eos_token_id=None))

    def test_expert_choice_is_refused(self) -> None:
        message = "text cannot be generated: the router 'expert_choice' is not causal: a token's experts depend on all"
        model = model_of("expert choice")
        with pytest.raises(UnsupportedError, match=message):
            model.generate(tokens(), max_new_tokens=2)
        for name in ("generate_batch", "init_continuous_batching"):  # not in every version of transformers
            if hasattr(model, name):
                with pytest.raises(UnsupportedError, match=message):
                    getattr(model, name)([[3, 4]])

    def test_expert_choice_is_not_served(self) -> None:
        from moesaic.serve.model import prepare

        with pytest.raises(UnsupportedError, match="text cannot be generated: the router 'expert_choice'"):
            prepare(model_of("expert choice"), 32)

    def test_hash_needs_ids(self) -> None:
        model = model_of("hash")
        with pytest.raises(ConfigError, match="call the model with input_ids, not with inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(tokens()))


def said(act: Callable[..., object], *args: Any, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act(*args, **kwargs)
    return [str(each.message) for each in caught if each.category is NotCausalWarning]


class TestWarning:
    @pytest.mark.parametrize("begin", ["train", "forward"])
    def test_is_given_once_a_model_while_training(self, begin: str) -> None:
        ids = tokens()
        for _ in range(2):
            model = model_of("expert choice")
            assert said(model, ids, labels=ids) == []
            if begin == "forward":  # as a model is that has just been made
                for module in model.modules():
                    module.training = True
            (message,) = said(model.train) if begin == "train" else said(model, ids, labels=ids)
            assert "'expert_choice' is not causal" in message
            assert "generation is refused" in message
            assert said(model.train) == []
            assert said(model, ids, labels=ids) == []

    def test_is_given_where_the_forward_is_compiled(self) -> None:
        torch._dynamo.reset()
        model, ids = model_of("expert choice", num_hidden_layers=1), tokens()
        compiled: Any = torch.compile(model, backend="eager")
        assert len(said(compiled.train)) == 1
        assert said(compiled, ids, labels=ids) == []
        torch._dynamo.reset()

    def test_is_not_given_to_others(self) -> None:
        for name in CAUSAL:
            model = model_of(name)
            assert said(model.train) + said(model, tokens(), labels=tokens()) == []
        known = model_of("expert choice")
        has_been_told(known)
        assert said(known.train) == []


@pytest.mark.parametrize("name", FAMILY)
def test_compiles_whole(name: str) -> None:
    """The layer, with the losses of training, in one graph."""
    torch.manual_seed(0)
    settings = FAMILY[name]
    layer = moesaic.MoE(
        moesaic.MoEConfig(
            16,
            8,
            4,
            settings.get("num_experts_per_tok", 2),
            settings["router"],
            settings.get("router_options", {}),
            settings.get("balancing", {}),
        )
    )
    context = moesaic.routing.RoutingContext(token_ids=torch.arange(10))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(10, 16)
    answers = []
    for run in (compiled, layer):
        torch.manual_seed(1)
        layer.zero_grad()
        y = run(x, context=copy.copy(context))
        (y.sum() + layer.aux_loss).backward()
        answers.append([y, layer.aux_loss, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(answers[0]) == len(answers[1])
    for got, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
