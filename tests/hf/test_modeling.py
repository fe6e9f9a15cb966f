"""MoesaicForCausalLM: cache, generation, saving, losses, checkpointing, and what it inherits from Qwen3-MoE."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.tiny import (
    check_the_cache_changes_nothing,
    config_of,
    enable_recomputation,
    gradients,
    model_of,
    tokens,
)
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic import MoesaicConfig, MoesaicForCausalLM, update_balancing
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.hf import MoesaicModel
from moesaic.layer import MoE, moe_layers

BALANCING = {"load_balancing": 0.1, "z_loss": 0.01}
SIGMOID = {"router": "sigmoid_topk", "router_options": {"num_groups": 2, "top_groups": 1}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced": {"balancing": BALANCING},
    "sigmoid": {**SIGMOID, "balancing": {"bias_update": 0.01}},
    "shared": {"num_shared_experts": 1, "shared_intermediate_size": 8, "shared_gate": True},
    "biased gelu": {"expert_activation": "gelu", "expert_bias": True},
    "some layers dense": {"mlp_only_layers": [0]},
    "every second layer sparse": {"decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True},
}


class TestForward:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_cache_changes_nothing(self, variant: str) -> None:
        check_the_cache_changes_nothing(model_of(**VARIANTS[variant]))

    def test_a_token_sees_only_what_came_before(self) -> None:
        model, ids = model_of(), tokens()
        changed = ids.clone()
        changed[:, 7] = (ids[:, 7] - 2) % 47 + 3
        with torch.no_grad():
            a, b = model(ids).logits, model(changed).logits
        torch.testing.assert_close(a[:, :7], b[:, :7])
        assert not torch.allclose(a[:, 7:], b[:, 7:])

    def test_attention_variants_agree(self) -> None:
        eager = model_of(attn_implementation="eager")
        sdpa = model_of(attn_implementation="sdpa")
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :4] = 0
        with torch.no_grad():
            a, b = eager(tokens(), attention_mask=mask), sdpa(tokens(), attention_mask=mask)
        torch.testing.assert_close(a.logits[1], b.logits[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.logits[0, 4:], b.logits[0, 4:], rtol=1e-4, atol=1e-5)

    def test_what_may_be_recorded(self) -> None:
        model = model_of(attn_implementation="eager")
        output = model(tokens(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
        assert len(output.hidden_states) == 3
        assert [list(a.shape) for a in output.attentions] == [[2, 4, 12, 12]] * 2
        assert [list(logits.shape) for logits in output.router_logits] == [[24, 4]] * 2
        assert torch.equal(output.router_logits[1], moe_layers(model)[1].last_routing.logits)
        assert model(tokens()).router_logits is None

    def test_the_configuration_may_ask_for_router_logits(self) -> None:
        assert len(model_of(output_router_logits=True, mlp_only_layers=[1])(tokens()).router_logits) == 1

    def test_a_tuple_instead_of_a_dataclass(self) -> None:
        model = model_of(balancing=BALANCING)
        named = model(tokens(), labels=tokens())
        plain = model(tokens(), labels=tokens(), return_dict=False)
        assert isinstance(plain, tuple)
        torch.testing.assert_close(plain[0], named.loss)

    def test_embeddings_instead_of_tokens(self) -> None:
        model = model_of()
        embedded = model.get_input_embeddings()(tokens())
        assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens()).logits)

    def test_only_the_last_logits(self) -> None:
        model = model_of()
        torch.testing.assert_close(model(tokens(), logits_to_keep=3).logits, model(tokens()).logits[:, -3:])

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        model = model_of(balancing=BALANCING)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()

    def test_without_our_settings_it_is_a_qwen3_moe(self) -> None:
        """Same weights under other names, same logits: attention, norms, rotary embedding are not ours to change."""
        model = model_of()
        names = {
            "router.weight": "gate.weight",
            "experts.up": "experts.gate_up_proj",
            "experts.down": "experts.down_proj",
        }
        known = Qwen3MoeConfig().to_dict()
        qwen = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**{k: v for k, v in model.config.to_dict().items() if k in known} | {"norm_topk_prob": True})
        ).eval()
        state = {}
        for name, value in model.state_dict().items():
            for ours, theirs in names.items():
                name = name.replace(f"mlp.{ours}", f"mlp.{theirs}")
            state[name] = value
        qwen.load_state_dict(state, strict=True)
        torch.testing.assert_close(model(tokens()).logits, qwen(tokens()).logits, rtol=1e-5, atol=1e-5)


class TestLosses:
    def test_the_loss_is_cross_entropy_and_the_layers_losses(self) -> None:
        model = model_of(balancing=BALANCING)
        labels = tokens().clone()
        labels[:, :4] = -100
        output = model(tokens(), labels=labels)
        ce = F.cross_entropy(output.logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
        aux = sum(layer.aux_loss for layer in moe_layers(model))
        assert aux.item() > 0
        torch.testing.assert_close(output.aux_loss, aux)
        torch.testing.assert_close(output.loss, ce + aux)

    def test_without_labels_there_is_no_loss(self) -> None:
        output = model_of(balancing=BALANCING)(tokens())
        assert output.loss is None
        assert output.aux_loss.item() > 0

    def test_without_a_balancer_the_auxiliary_loss_is_zero(self) -> None:
        assert model_of()(tokens()).aux_loss.item() == 0.0

    def test_a_model_without_any_sparse_layer(self) -> None:
        output = model_of(mlp_only_layers=[0, 1], output_router_logits=True)(tokens(), labels=tokens())
        assert output.loss.isfinite()
        assert output.router_logits == ()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_parameter_learns(self, variant: str) -> None:
        model = model_of(**VARIANTS[variant]).train()
        missing = {name for name, _ in model.named_parameters()} - gradients(model).keys()
        assert not missing

    def test_the_bias_moves_after_a_step(self) -> None:
        model = model_of(**VARIANTS["sigmoid"]).train()
        gradients(model)
        update_balancing(model)
        assert all(layer.router.get_buffer("selection_bias").any() for layer in moe_layers(model))

    def test_the_head_on_another_device(self) -> None:
        model = model_of(balancing=BALANCING)
        model.lm_head.to("meta").register_forward_pre_hook(lambda head, inputs: (inputs[0].to("meta"),))
        output = model(tokens(), labels=tokens())
        assert output.loss.device == output.aux_loss.device == torch.device("meta")
        assert model(tokens()).aux_loss.device == torch.device("meta")


class TestPadding:
    """A batch with padding on the left is what it would be without: four columns of it here, before eight tokens."""

    MASK = torch.tensor([[0] * 4 + [1] * 8] * 2)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_it_is_not_routed(self, checkpointing: bool) -> None:
        settings = {**SIGMOID, "balancing": {**BALANCING, "bias_update": 0.01}}
        # Capacity is a share of all rows: 12 columns at 8 / 12 of a factor of 1 have what 8 columns have at 1.
        padded, plain = (model_of(**settings, capacity_factor=factor).train() for factor in (8 / 12, 1.0))
        if checkpointing:
            enable_recomputation(padded)
        ids = tokens()
        got = padded(ids, attention_mask=self.MASK, labels=ids.where(self.MASK.bool(), -100))
        wanted = plain(ids[:, 4:], labels=ids[:, 4:])
        torch.testing.assert_close(got.logits[:, 4:], wanted.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.aux_loss, wanted.aux_loss)
        for one, other in zip(moe_layers(padded), moe_layers(plain), strict=True):
            assert torch.equal(one.slot_counts, other.slot_counts)
            assert int(other.slot_counts.sum()) == 2 * 8 * 2
            assert one.last_routing is not None and one.last_routing.dropped == other.last_routing.dropped
        got.loss.backward()
        assert padded.model.layers[0].mlp.router.weight.grad.isfinite().all()

    def test_with_a_cache_the_mask_is_that_of_the_new_tokens(self) -> None:
        model, ids = model_of(mlp_only_layers=[0]), tokens()
        with torch.no_grad():
            cache = model(ids[:, :6], attention_mask=self.MASK[:, :6], use_cache=True).past_key_values
            mask = self.MASK.clone()
            mask[1, -1] = 0
            model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
        (layer,) = moe_layers(model)
        assert (layer.last_routing.expert_ids == 4).all(dim=1).nonzero().flatten().tolist() == [11]

    def test_it_is_forgotten_after_the_call(self) -> None:
        model, ids = model_of(balancing=BALANCING).train(), tokens()
        wanted = model(ids).aux_loss
        model(ids, attention_mask=self.MASK)
        with pytest.raises(RuntimeError):
            model(ids, attention_mask=self.MASK, position_ids=torch.zeros(5, 5, dtype=torch.int64))
        assert torch.equal(model(ids).aux_loss, wanted)

    def test_a_mask_of_four_dimensions_is_the_attentions_alone(self) -> None:
        model, ids = model_of(), tokens()
        causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
        torch.testing.assert_close(model(ids, attention_mask=causal).logits, model(ids).logits)

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        model = model_of(balancing=BALANCING, mlp_only_layers=[0])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            got, wanted = (m(tokens(), attention_mask=self.MASK) for m in (compiled, model))
        torch.testing.assert_close(got.logits[:, 4:], wanted.logits[:, 4:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.aux_loss, wanted.aux_loss)
        torch._dynamo.reset()


class TestGradientCheckpointing:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_gradients_are_equal(self, variant: str) -> None:
        model = model_of(**VARIANTS[variant]).train()
        wanted = gradients(model)
        enable_recomputation(model)
        got = gradients(model)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    def test_the_reentrant_kind_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="use_reentrant=True would lose the gradient of aux_loss"):
            enable_recomputation(model_of(), {"use_reentrant": True})
        model = model_of(balancing=BALANCING).train()
        enable_recomputation(model, {"use_reentrant": False})
        assert len(gradients(model)) > 1  # not the loss alone


class TestGeneration:
    def test_greedy_is_the_argmax_of_the_whole_forward(self) -> None:
        model, ids = model_of(), tokens(1, 5)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        for t in range(5, out.shape[1]):
            with torch.no_grad():
                assert model(out[:, :t]).logits[0, -1].argmax() == out[0, t]

    def test_padding_on_the_left_changes_nothing(self) -> None:
        model, ids = model_of(), tokens(1, 6)
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        with_padding = model.generate(padded, attention_mask=(padded != 0).long(), **settings)
        assert torch.equal(with_padding[:, 4:], plain)

    def test_sampling_follows_the_seed(self) -> None:
        model, ids = model_of(), tokens(2, 6)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=True))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_beams(self) -> None:
        ids = tokens(2, 6)
        out = model_of().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, num_beams=3, do_sample=False
        )
        assert out.shape[0] == 2


class TestSaving:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_save_and_load(self, variant: str, tmp_path: Path) -> None:
        model = model_of(**VARIANTS[variant])
        for layer in moe_layers(model):
            for buffer in layer.router.buffers():
                buffer.uniform_(-0.3, 0.3)
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert type(loaded) is MoesaicForCausalLM
        assert type(AutoConfig.from_pretrained(tmp_path)) is MoesaicConfig
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert tied == bool(model.config.tie_word_embeddings)

    def test_what_is_not_saved_is_ready_after_loading(self, tmp_path: Path) -> None:
        model_of(balancing=BALANCING).save_pretrained(tmp_path)
        for layer in moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path)):
            assert layer.slot_counts.tolist() == [0] * 4
            assert layer.last_routing is None
            assert layer.aux_loss.item() == 0.0

    def test_a_router_that_the_checkpoint_does_not_have_starts_afresh(self, tmp_path: Path) -> None:
        model = model_of()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **SIGMOID)
        for layer, saved in zip(moe_layers(loaded), moe_layers(model), strict=True):
            assert layer.router.get_buffer("selection_bias").tolist() == [0.0] * 4
            assert torch.equal(layer.router.weight, saved.router.weight)

    def test_in_bfloat16(self, tmp_path: Path) -> None:
        model = model_of(**VARIANTS["sigmoid"])
        for layer in moe_layers(model):
            layer.router.get_buffer("selection_bias").copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-4)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        for layer in moe_layers(loaded):  # it moves in steps that bfloat16 cannot hold
            bias = layer.router.get_buffer("selection_bias")
            assert bias.dtype == torch.float32
            torch.testing.assert_close(bias, torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-4)
        output = loaded(tokens(), labels=tokens())
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        wanted = model(tokens()).logits
        assert (output.logits.float() - wanted).norm() < 0.1 * wanted.norm()

    def test_a_copy_after_a_forward(self) -> None:
        model = model_of(balancing=BALANCING)
        model(tokens(), labels=tokens()).loss.backward()
        assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)

    def test_the_decoder_alone(self, tmp_path: Path) -> None:
        model = model_of()
        model.save_pretrained(tmp_path)
        decoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(decoder) is MoesaicModel
        assert not info["missing_keys"]
        assert torch.equal(decoder(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)

    def test_settings_without_effect_are_not_saved(self, tmp_path: Path) -> None:
        config_of().save_pretrained(tmp_path)
        assert not {"norm_topk_prob", "router_aux_loss_coef"} & set(json.loads((tmp_path / "config.json").read_text()))

    def test_a_larger_vocabulary(self) -> None:
        model = model_of()
        model.resize_token_embeddings(60)
        assert model(tokens()).logits.shape[-1] == 60


class TestConfiguration:
    def test_defaults_go_round(self) -> None:
        config = MoesaicConfig()
        again = MoesaicConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert config.moe_config().router == "softmax_topk"

    def test_which_layers_are_sparse(self) -> None:
        def kinds(**changes: Any) -> list[bool]:
            return [isinstance(layer.mlp, MoE) for layer in model_of(num_hidden_layers=4, **changes).model.layers]

        assert kinds() == [True] * 4
        assert kinds(mlp_only_layers=[1, 2]) == [True, False, False, True]
        assert kinds(decoder_sparse_step=2) == [False, True, False, True]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_experts_per_tok": 5}, "top_k is 5: it must be at least 1 and at most num_experts = 4"),
            ({"router": "softmx_topk"}, r"unknown router 'softmx_topk': did you mean 'softmax_topk'\?"),
            ({"router_options": {"nope": 1}}, "router 'softmax_topk' has no option 'nope'"),
            ({"balancing": {"bias_update": 0.1}}, "'bias_update' needs a router with a selection_bias"),
            (
                {"hidden_size": 33, "head_dim": None},
                r"hidden_size \(d_model\) is 33: num_attention_heads = 4 must divide",
            ),
            ({"num_key_value_heads": 3}, "num_attention_heads is 4: num_key_value_heads = 3 must divide it"),
            ({"expert_activation": "swish"}, "unknown activation 'swish'"),
            ({"moe_intermediate_size": 0}, "d_ff is 0: it must be at least 1"),
            ({"num_key_value_heads": 0}, "num_key_value_heads is 0: it must be at least 1"),
            ({"num_attention_heads": 0}, "num_attention_heads is 0: it must be at least 1"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be at least 1"),
            ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0: it must be at least 1"),
            ({"vocab_size": 0}, "vocab_size is 0: it must be at least 1"),
        ],
    )
    def test_what_does_not_go_together(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            config_of(**changes)

    def test_public_names(self) -> None:
        assert moesaic.MoesaicForCausalLM is MoesaicForCausalLM
        assert AutoConfig.for_model("moesaic", num_experts=8).num_experts == 8
        assert isinstance(AutoModelForCausalLM.from_config(config_of()), MoesaicForCausalLM)
