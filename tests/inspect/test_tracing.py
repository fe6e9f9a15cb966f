"""Tracing models: what is written down is what the routers did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.data import Document, train_tokenizer
from moesaic.errors import ConfigError, DataError, UnsupportedError, UsageError
from moesaic.inspect import RoutingTrace, analyze, collect
from moesaic.inspect.tracing import entropy_from_logits, score_entropy, weight_entropy
from moesaic.layer import MoE, moe_layers
from moesaic.routing import ROUTERS, Routing
from moesaic.routing.softmax_topk import SoftmaxTopK

DOCUMENTS = [
    Document("code", "a.py", "def add(x, y):\n    return x + y\n" * 12),
    Document("prose", "b.txt", "It was a bright cold day in April. " * 12),
]
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS, TOP_K = 5, 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(DOCUMENTS, 280)


def with_strong_routers(model: PreTrainedModel) -> PreTrainedModel:
    """Far from an even distribution, so that a wrong one would show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "mlp.gate." in name:
                parameter.normal_(std=0.7)
    return model


def ours(**changes: Any) -> MoesaicForCausalLM:
    settings = SIZES | {"head_dim": 8, "moe_intermediate_size": 8, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    return with_strong_routers(MoesaicForCausalLM(MoesaicConfig(**(settings | changes))))


def qwen3_moe() -> PreTrainedModel:
    return with_strong_routers(
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES,
                head_dim=8,
                moe_intermediate_size=8,
                num_experts=EXPERTS,
                num_experts_per_tok=TOP_K,
                mlp_only_layers=[1],
            )
        )
    )


def mixtral() -> PreTrainedModel:
    return with_strong_routers(
        MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K))
    )


def gpt_oss() -> PreTrainedModel:
    return with_strong_routers(
        GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K))
    )


def deepseek_v3() -> PreTrainedModel:
    config = DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return with_strong_routers(DeepseekV3ForCausalLM(config))


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(dim=-1)


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().sigmoid()


def collected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RoutingTrace:
    return collect(model, tokenizer, DOCUMENTS, name="tiny", max_tokens=90, sequence_length=20)


@pytest.mark.parametrize(
    ("build", "numbers", "scores"),
    [
        (ours, [0, 1, 2], softmax),
        (lambda: ours(router="sigmoid_topk", mlp_only_layers=[0]), [1, 2], sigmoid),
        (qwen3_moe, [0, 2], softmax),
        (mixtral, [0, 1, 2], softmax),
        (gpt_oss, [0, 1, 2], softmax),
        (deepseek_v3, [1, 2], sigmoid),
    ],
    ids=["moesaic", "moesaic-sigmoid", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"],
)
def test_the_trace_is_what_the_routers_decided(
    build: Callable[[], PreTrainedModel],
    numbers: list[int],
    scores: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = build().eval()
    trace = collected(model, tokenizer)
    assert [layer.number for layer in trace.layers] == numbers
    for passage in trace.passages:
        ids = torch.from_numpy(trace.token_ids[passage.start : passage.stop])
        with torch.no_grad():
            outputs = model(input_ids=ids[None], output_router_logits=True)
        if getattr(outputs, "router_logits", None) is None:
            pytest.skip("this transformers does not record DeepSeek-V3's router logits")
        for layer, logits_TE in zip(trace.layers, outputs.router_logits, strict=True):
            # No router here has a selection bias that is not zero, so the largest scores are the chosen ones.
            scores_TE = scores(logits_TE.reshape(-1, EXPERTS))
            best, chosen = scores_TE.topk(TOP_K, dim=-1)
            assert layer.num_experts == EXPERTS
            own = slice(passage.start, passage.stop)
            assert np.array_equal(np.sort(layer.expert_ids[own]), np.sort(chosen.numpy()))
            shares = layer.weights[own] / layer.weights[own].sum(axis=1, keepdims=True)
            assert np.allclose(np.sort(shares), np.sort((best / best.sum(-1, keepdim=True)).numpy()), atol=1e-5)
            p = (scores_TE / scores_TE.sum(-1, keepdim=True)).numpy()
            assert np.allclose(layer.entropy[own], -(p * np.log(p)).sum(axis=1) / np.log(EXPERTS), atol=1e-5)
            assert layer.entropy_source == "scores"


def test_a_model_that_keeps_its_scores(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    monkeypatch.setattr(type(model.base_model), "_can_record_outputs", {})
    monkeypatch.setattr(type(model), "_can_record_outputs", {})
    for layer in collected(model, tokenizer).layers:
        assert layer.entropy_source == "weights"
        p = layer.weights
        assert np.allclose(layer.entropy, -(p * np.log(p)).sum(axis=1) / np.log(TOP_K))


def test_dropped_slots_are_empty_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = collected(ours(capacity_factor=0.5), tokenizer)
    for layer in trace.layers:
        empty = layer.expert_ids == EXPERTS
        assert layer.dropped == empty.sum() > 0
        assert (layer.weights[empty] == 0).all()


class EveryOther(SoftmaxTopK):
    """Tokens whose first feature is negative take one expert only; the second slot is null. One batch in two has no
    second slot at all."""

    calls = 0

    def forward(self, x_TD: torch.Tensor, top_k: int | None = None) -> Routing:
        routing = super().forward(x_TD, top_k)
        null_TK = torch.zeros_like(routing.expert_ids, dtype=torch.bool)
        null_TK[:, 1] = x_TD[:, 0] < 0
        EveryOther.calls += 1
        if EveryOther.calls % 2:
            return routing.without(null_TK)
        return replace(routing, expert_ids=routing.expert_ids[:, :1], weights=routing.weights[:, :1])


@pytest.fixture
def every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS._parts, "every_other", EveryOther)


@pytest.mark.usefixtures("every_other")
def test_routers_with_null_slots(tokenizer: PreTrainedTokenizerBase) -> None:
    model = ours(router="every_other", num_hidden_layers=1)
    seen: list[Routing] = []
    (layer,) = moe_layers(model)
    handle = layer.register_forward_hook(lambda layer, args, output: seen.append(layer.last_routing))
    trace = collected(model, tokenizer)
    handle.remove()
    assert {routing.top_k for routing in seen} == {1, 2}
    (traced,) = trace.layers
    rows = [ids for routing in seen for ids in routing.expert_ids.tolist()]
    assert [[e for e in ids if e < EXPERTS] for ids in traced.expert_ids.tolist()] == [
        [e for e in ids if e < EXPERTS] for ids in rows
    ]
    assert (traced.weights[traced.expert_ids == EXPERTS] == 0).all()
    report = analyze(trace)
    mean = report["experts_per_token"]["mean"]
    assert report["experts_per_token"]["varies"]
    assert 1 < mean < 2
    one_expert = 3 * 16 * 8
    assert trace.model.total_parameters - trace.model.active_parameters == pytest.approx(
        (EXPERTS - mean) * one_expert, abs=1
    )


def test_zero_computation_experts_are_told_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = collected(ours(zero_computation_experts={"zero": 1, "copy": 2}), tokenizer)
    for layer in trace.layers:
        assert (layer.num_experts, layer.zero_computation) == (EXPERTS, ["copy", "copy", "zero"])
        assert 0 < (layer.expert_ids >= EXPERTS).sum() < layer.expert_ids.size
        assert layer.expert_ids.max() < EXPERTS + 3
    spent = analyze(trace)["experts_per_token"]
    assert spent["varies"]
    assert spent["mean"] + spent["free"] == pytest.approx(TOP_K, abs=1e-4)


def test_experts_of_unequal_width_count_by_their_size(tokenizer: PreTrainedTokenizerBase) -> None:
    widths = [8, 8, 16, 4, 4]
    trace = collected(ours(expert_d_ffs=widths, num_hidden_layers=1), tokenizer)
    (layer,) = trace.layers
    met = [sum(3 * 16 * widths[e] for e in ids) for ids in layer.expert_ids.tolist()]
    idle = 3 * 16 * sum(widths) - sum(met) / len(met)
    assert trace.model.total_parameters - trace.model.active_parameters == pytest.approx(idle, abs=1)


def test_each_routing_of_an_iterated_layer_is_a_layer(tokenizer: PreTrainedTokenizerBase) -> None:
    model = ours(iterations=2, num_hidden_layers=2)
    seen: list[tuple[Routing, ...]] = []
    handle = moe_layers(model)[1].register_forward_hook(lambda layer, args, output: seen.append(layer.last_routings))
    trace = collected(model, tokenizer)
    handle.remove()
    assert [layer.label for layer in trace.layers] == ["0.1", "0.2", "1.1", "1.2"]
    for time, layer in enumerate(trace.layers[2:]):
        assert layer.expert_ids.tolist() == [ids for both in seen for ids in both[time].expert_ids.tolist()]
    pairs = ((trace.layers[i].expert_ids, trace.layers[i + 1].expert_ids) for i in (0, 2))
    used = [len({*a, *b}) for first, second in pairs for a, b in zip(first, second, strict=True)]
    idle = 2 * EXPERTS - sum(used) / trace.num_tokens
    assert trace.model.total_parameters - trace.model.active_parameters == pytest.approx(idle * 3 * 16 * 8, abs=1)
    assert [layer["label"] for layer in analyze(trace)["layers"]] == ["0.1", "0.2", "1.1", "1.2"]


def test_parameters_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    model = ours(num_shared_experts=1)
    facts = collected(model, tokenizer).model
    one_expert = 3 * 16 * 8  # gate, up and down
    assert facts.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.active_parameters == facts.total_parameters - 3 * (EXPERTS - TOP_K) * one_expert
    assert (facts.name, facts.architecture, facts.num_layers) == ("tiny", "MoesaicForCausalLM", 3)


def test_parameters_of_unequal_experts_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    model = ours(num_hidden_layers=1, expert_d_ffs=[4] * (EXPERTS - 1) + [40])
    trace = collected(model, tokenizer)
    total = sum(parameter.numel() for parameter in model.parameters())
    (layer,) = trace.layers
    sizes = [3 * 16 * 4] * (EXPERTS - 1) + [3 * 16 * 40]
    met = sum(sizes[int(expert)] for expert in layer.expert_ids.flatten()) / len(layer.expert_ids)
    assert trace.model.active_parameters == round(total - sum(sizes) + met)


def test_the_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    model = ours().train()
    collected(model, tokenizer)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(not layer.slot_counts.any() for layer in moe_layers(model))  # balancing saw no training step
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_go_when_a_forward_fails(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.norm, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        collected(model, tokenizer)
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_and_the_longest_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[tuple[int, int]] = []
    trace = collect(
        ours(max_position_embeddings=16),
        tokenizer,
        DOCUMENTS,
        name="x",
        max_tokens=60,
        progress=lambda *n: seen.append(n),
    )
    assert max(passage.stop - passage.start for passage in trace.passages) == 16
    assert seen == [(16, 60), (30, 60), (46, 60), (60, 60)]  # neighbours of different lengths go alone


def test_a_dense_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no MoE layer"):
        collected(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer)


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="does not fit the model"):
        collected(ours(vocab_size=100), tokenizer)


def test_no_tokens_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        collect(ours(), tokenizer, DOCUMENTS, name="x", max_tokens=0)


def test_rows_that_are_not_the_tokens_are_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours()
    layer = moe_layers(model)[1]
    inner = layer.forward
    # As a layer would that looks at every second token only.
    monkeypatch.setattr(
        layer, "forward", lambda x, **_: torch.nn.functional.pad(inner(x[:, ::2]), (0, 0, 0, x.shape[1] // 2))
    )
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp \(MoE\) routed 20 rows where there were 40 tokens"):
        collected(model, tokenizer)
    assert isinstance(layer, MoE)


def test_logits_that_do_not_explain_the_weights_are_not_used() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 6).double() * 2
    weights, ids = logits.softmax(-1).topk(2)
    assert entropy_from_logits(logits, ids, weights)[0] == "scores"
    assert entropy_from_logits(logits, ids, 2.5 * weights)[0] == "scores"  # a routed scaling factor
    for other in (None, logits[:25], -logits):
        source, entropy = entropy_from_logits(other, ids, weights)
        assert source == "weights"
        assert torch.equal(entropy, weight_entropy(weights))


def test_entropy_at_its_ends() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert score_entropy(scores).tolist() == pytest.approx([1, 0, 0])
    assert weight_entropy(torch.ones(2, 1, dtype=torch.float64)).tolist() == [0, 0]  # one slot: nothing to decide
