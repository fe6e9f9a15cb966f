"""``reroute``: the trained gates' logits, another choice; exactly as before afterwards."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.test_models import config_of, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moesaic
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.layer import moe_layers
from moesaic.routing import ROUTERS, Router, Routing


def build(kind: str = "qwen3_moe", implementation: str = "moesaic", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(kind)
    config.update(settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()
    widen(model)
    return model


def ours(**settings: Any) -> moesaic.MoesaicForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 16}
    more = {"num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = moesaic.MoesaicForCausalLM(moesaic.MoesaicConfig(**{**sizes, **more, **settings})).eval()
    widen(model)
    return model


def widen(model: nn.Module) -> None:
    """So that the experts, and which of them, show in the logits."""
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate.weight" in name or "router.weight" in name:
            nn.init.normal_(parameter, std=0.2)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits  # type: ignore[no-any-return]


@pytest.fixture(params=["qwen3_moe", "olmoe", "deepseek_v3", "moesaic", "moesaic sigmoid"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "moesaic":
        return ours()
    if request.param == "moesaic sigmoid":
        return ours(router="sigmoid_topk", router_options={"scale": 2.5}, balancing={"bias_update": 1e-3})
    return build(request.param)


CHOICES: list[tuple[str | None, dict[str, Any]]] = [
    (None, {"top_k": 1}),
    (None, {"top_k": 4}),
    ("softmax_topk", {"top_k": 3}),
    ("sigmoid_topk", {"top_k": 3}),
    ("expert_skipping", {"ratio": 0.9}),
    ("top_p", {"top_k": 8, "threshold": 0.5}),
    ("tsallis", {"top_k": 8}),
    ("hash", {}),
]
# Routers of this list may come with a later version.
PRESENT = [(name, options) for name, options in CHOICES if name is None or name in ROUTERS]


@pytest.mark.parametrize(("router", "options"), PRESENT, ids=str)
def test_as_before_to_the_bit_afterwards(model: nn.Module, router: str | None, options: dict[str, Any]) -> None:
    before, state = logits(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with moesaic.reroute(model, router, **options) as handle:
        assert torch.equal(torch.get_rng_state(), random)
        assert len(handle.layers) >= 1
        during = logits(model)
        assert torch.isfinite(during).all()
        assert not torch.equal(during, before)
        assert torch.equal(logits(model), during)
    assert torch.equal(logits(model), before)
    assert str(state.keys()) == str(model.state_dict().keys())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    handle.remove()  # once is enough, twice does no harm
    with moesaic.reroute(model, router, **options):
        pass


def test_the_models_own_rule_by_its_name_changes_nothing(model: nn.Module) -> None:
    """``normalize``, ``scale``, groups and selection bias are found out, and kept."""
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "e_score_correction_bias" in name or "selection_bias" in name:
            nn.init.normal_(tensor, std=0.5)
    before = logits(model)
    has_bias = any("bias" in name for name, _ in model.named_buffers())
    with moesaic.reroute(model, "sigmoid_topk" if has_bias else "softmax_topk"):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def reference(
    logits_TE: Tensor, router: str, top_k: int, options: dict[str, Any], normalize: bool
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and weights of each token by loops in float64."""
    ids, weights = [], []
    for row in logits_TE.double().tolist():
        exponents = [torch.tensor(value).double().exp().item() for value in row]
        p = [value / sum(exponents) for value in exponents]
        order = sorted(range(len(p)), key=lambda expert: -p[expert])[:top_k]
        if router == "expert_skipping":
            order = [expert for expert in order if p[expert] >= options["ratio"] * p[order[0]]]
        taken = [p[expert] for expert in order]
        ids.append(order)
        weights.append([value / sum(taken) if normalize else value for value in taken])
    return ids, weights


@pytest.mark.parametrize(("kind", "normalize"), [("mixtral", True), ("olmoe", False)])
@pytest.mark.parametrize(
    ("router", "top_k", "options"), [("softmax_topk", 3, {}), ("expert_skipping", 4, {"ratio": 0.6})]
)
def test_what_the_experts_are_told(
    kind: str, normalize: bool, router: str, top_k: int, options: dict[str, Any]
) -> None:
    """The gate's own logits by loops in float64; unused slots are null."""
    model = build(kind)
    told: list[tuple[Any, ...]] = []
    gate, experts = model.get_submodule("model.layers.0.mlp.gate"), model.get_submodule("model.layers.0.mlp.experts")
    own: list[Tensor] = []
    gate.register_forward_hook(lambda module, args, output: own.append(output[0]))
    experts.register_forward_pre_hook(lambda module, args: told.append(args))
    with moesaic.reroute(model, router, top_k=top_k, **options) as handle:
        logits(model)
    ids, weights = reference(own[0], router, top_k, options, normalize)
    _, got_ids, got_weights = told[0]
    assert got_ids.shape[1] == top_k
    for token, (expected_ids, expected_weights) in enumerate(zip(ids, weights, strict=True)):
        used = len(expected_ids)
        assert got_ids[token, :used].tolist() == expected_ids
        assert got_ids[token, used:].tolist() == [8] * (top_k - used)
        assert got_weights[token, :used].tolist() == pytest.approx(expected_weights, rel=1e-5)
        assert got_weights[token, used:].abs().sum() == 0
    if router == "expert_skipping":
        assert 1 <= handle.experts_per_token() < top_k


def test_null_slots_cost_no_rows_and_eager_agrees() -> None:
    model = build()
    with moesaic.reroute(model, "expert_skipping", top_k=6, ratio=0.8) as handle:
        fast = logits(model)
        rows = sum(int(m.last_counts.sum()) for m in model.modules() if hasattr(m, "last_counts"))
        assert rows == round(handle.experts_per_token() * 20 * 2) < 6 * 20 * 2
        model.set_experts_implementation("eager")
        torch.testing.assert_close(logits(model), fast, rtol=1e-4, atol=1e-5)


def test_hash_reads_the_token_ids_also_while_generating(model: nn.Module) -> None:
    if "hash" not in ROUTERS:
        pytest.skip("there is no router 'hash'")
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    with moesaic.reroute(model, "hash"):
        with torch.no_grad():
            longer = model.generate(tokens(), **settings)
            step_by_step = model(longer).logits[:, 9:-1].argmax(dim=-1)
        assert torch.equal(longer[:, 10:], step_by_step)
        with pytest.raises(ConfigError, match=r"token_ids|token ids"):
            model(inputs_embeds=model.get_input_embeddings()(tokens()))


def test_generates_as_it_computes(model: nn.Module) -> None:
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    with moesaic.reroute(model, "expert_skipping", top_k=4, ratio=0.9), torch.no_grad():
        longer = model.generate(tokens(), **settings)
        assert torch.equal(longer[:, 10:], model(longer).logits[:, 9:-1].argmax(dim=-1))


def test_transformers_models_are_saved_as_they_were(tmp_path: Path) -> None:
    model = build()
    before = logits(model)
    with moesaic.reroute(model, "softmax_topk", top_k=1):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic").eval()
    assert torch.equal(logits(loaded), before)


def test_ours_are_saved_with_the_new_router(tmp_path: Path) -> None:
    model = ours()
    before = logits(model)
    with moesaic.reroute(model, "sigmoid_topk", top_k=3, scale=2.0):
        rerouted = logits(model)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.router, loaded.config.num_experts_per_tok) == ("sigmoid_topk", 3)
    assert torch.equal(logits(loaded), rerouted)
    assert model.config.router == "softmax_topk"
    assert torch.equal(logits(model), before)


OURS: dict[str, dict[str, Any]] = {
    "chain": {"iterations": 2},
    "pre-gated layers": {"pre_gating": "layer"},
    "pre-gated stack": {"pre_gating": "stack"},
    "zero computation": {"zero_computation_experts": {"zero": 2, "constant": 1}, "router": "null_experts"},
    "unequal": {"expert_d_ffs": [8, 8, 16, 16, 24, 24, 32, 32]},
    "recurrent": {"router": "recurrent"},
    "scheduled": {"balancing": {"load_balancing": {"coefficient": 0.1, "final": 0.0, "steps": 10}}},
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(("router", "options"), [(None, {"top_k": 3}), ("expert_skipping", {"top_k": 4, "ratio": 0.9})])
def test_ours_of_every_form(kind: str, router: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    model = ours(num_hidden_layers=3, **OURS[kind])
    before = logits(model)
    if router and kind == "recurrent":
        with pytest.raises(UnsupportedError, match="read something else than its features: only top_k may change"):
            moesaic.reroute(model, router, **options)
        return
    with moesaic.reroute(model, router, **options) as handle:
        during = logits(model)
        assert not torch.equal(during, before)
        assert 0 < handle.experts_per_token() <= options["top_k"]
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        moesaic.update_balancing(model)
        model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), during)


def test_a_balancer_that_has_nothing_to_move_is_left_out(tmp_path: Path) -> None:
    model = ours(router="sigmoid_topk", balancing={"bias_update": 1e-3, "z_loss": 0.1})
    with moesaic.reroute(model, "softmax_topk"):
        during = logits(model)
        assert model.config.balancing == {"z_loss": 0.1}
        model.train()
        assert model(tokens(), labels=tokens()).aux_loss > 0
        moesaic.update_balancing(model)
        model.eval().save_pretrained(tmp_path)
    assert model.config.balancing == {"bias_update": 1e-3, "z_loss": 0.1}
    model.train()
    model(tokens(), labels=tokens())
    moesaic.update_balancing(model)
    assert all(bool(layer.router.selection_bias.any()) for layer in moe_layers(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), during)


def test_a_balancer_of_logits_is_left_out_where_there_are_none() -> None:
    model = ours(balancing={"load_balancing": 0.01, "z_loss": 0.1})
    with moesaic.reroute(model, "hash"):
        assert model.config.balancing == {"load_balancing": 0.01}
        assert torch.isfinite(logits(model)).all()


def test_a_layer_of_ours_alone_and_in_training() -> None:
    layer = moesaic.MoE(moesaic.MoEConfig(d_model=16, d_ff=8, num_experts=4, top_k=2))
    weight = layer.router.weight
    with moesaic.reroute(layer, "expert_skipping", ratio=0.9) as handle:
        assert handle.layers == ["router"]
        assert layer.config.router == "expert_skipping"
        assert layer.router.weight is weight
        layer(torch.randn(5, 16)).sum().backward()
        assert weight.grad is not None
        assert handle.experts_per_token() <= 2
    assert layer.config.router == "softmax_topk"


def test_a_copy_is_rerouted_too() -> None:
    model = build()
    before = logits(model)
    with moesaic.reroute(model, "softmax_topk", top_k=1):
        rerouted, copied = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(copied), rerouted)
    assert torch.equal(logits(model), before)


def test_a_rerouted_model_goes_when_nobody_holds_it(model: nn.Module) -> None:
    fresh = copy.deepcopy(model)
    handle = moesaic.reroute(fresh, "expert_skipping")
    logits(fresh)
    gone = weakref.ref(fresh)
    del fresh, handle
    gc.collect()
    assert gone() is None


def test_compiled() -> None:
    torch._dynamo.reset()
    model = build()
    with moesaic.reroute(model, "expert_skipping", top_k=4), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_a_frozen_model_takes_another_number_of_experts() -> None:
    from tests.hf.tiny import model_of
    from tests.hf.tiny import tokens as ids

    plain = model_of()
    frozen = moesaic.freeze(copy.deepcopy(plain))
    with torch.no_grad(), moesaic.use_backend("native"):
        wanted, before = {}, frozen(ids()[:, :3]).logits
        for model in (plain, frozen):
            with moesaic.reroute(model, top_k=1):
                wanted[model] = model(ids()[:, :3]).logits
                assert all(layer.last_routing.top_k == 1 for layer in moe_layers(model))
        assert (wanted[plain] - wanted[frozen]).norm() < 1e-4 * wanted[plain].norm()
        assert torch.equal(frozen(ids()[:, :3]).logits, before)


def test_only_the_number_of_experts(model: nn.Module) -> None:
    before = logits(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with moesaic.reroute(model, top_k=3) as handle:
        assert math.isnan(handle.experts_per_token())
        assert not torch.equal(logits(model), before)
        assert handle.experts_per_token() == 3
    assert torch.equal(logits(model), before)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("router", [None, "softmax_topk"])
@pytest.mark.parametrize("top_k", [0, 9, -1])
def test_a_number_of_slots_out_of_range(model: nn.Module, router: str | None, top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"top_k is {top_k}: it must be at least 1 and at most num_experts = 8"):
        moesaic.reroute(model, router, top_k=top_k)


def test_refusals() -> None:
    model = build()
    before = logits(model)
    for arguments, message in [
        ({"router": "softmax"}, "unknown router 'softmax': did you mean"),
        ({"router": "softmax_topk", "ratio": 1}, "no option 'ratio'"),
        ({"router": "softmax_topk", "top_k": 9}, "top_k is 9: it must be at least 1 and at most num_experts = 8"),
        ({}, "name a router"),
        ({"top_k": 0}, "top_k is 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            moesaic.reroute(model, **arguments)
    with moesaic.reroute(model, top_k=1), pytest.raises(ConfigError, match="rerouted already: call remove"):
        moesaic.reroute(model, top_k=3)
    with pytest.raises(UnsupportedError, match="_Dense has no MoE layers to reroute"):
        moesaic.reroute(_Dense(), "softmax_topk")
    with pytest.raises(UnsupportedError, match=r"mlp.gate \(PhimoeTopKRouter\)|router.*always takes 2 experts"):
        moesaic.reroute(build("phimoe"), top_k=3)
    assert torch.equal(logits(model), before)


@pytest.fixture
def registered() -> Iterator[type[Router]]:
    class Learned(Router):
        def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
            super().__init__(d_model, num_experts, top_k)
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
            raise AssertionError

    ROUTERS.register("learned")(Learned)
    yield Learned
    del ROUTERS._parts["learned"]


@pytest.mark.usefixtures("registered")
def test_routers_with_parameters_of_their_own_are_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"router 'learned' has a parameter 'temperature'.*not trained with"):
        moesaic.reroute(model, "learned")


@pytest.mark.parametrize("name", ROUTERS.names())
def test_every_router_reroutes_or_says_why_not(name: str) -> None:
    """Whatever is registered: one clear line, or a model that computes and comes back."""
    for model in (build(), ours()):
        before = logits(model)
        refusal = ""
        try:
            with moesaic.reroute(model, name):
                assert torch.isfinite(logits(model)).all()
        except (ConfigError, UnsupportedError) as error:
            refusal = str(error)
        assert len(refusal) < 300
        assert "\n" not in refusal
        assert torch.equal(logits(model), before)
