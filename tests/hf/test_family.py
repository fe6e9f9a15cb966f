"""The whole life of a model of each kind of layer: cache, generation, saving, checkpointing, precision, few bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.hf.family import FAMILY
from tests.hf.tiny import check_the_cache_changes_nothing, enable_recomputation, gradients, model_of, tokens
from tests.reference import relative_error
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.errors import UnsupportedError
from moesaic.hf.placement import moe_blocks, permute_experts
from moesaic.layer import moe_layers
from moesaic.train.model import count_parameters

ALL = pytest.mark.parametrize("variant", FAMILY)
COMPILED = {"chain of all", "pre-gated stack"}  # the others take long, and are made of the same


@ALL
def test_the_cache_changes_nothing(variant: str) -> None:
    check_the_cache_changes_nothing(model_of(**FAMILY[variant]))


@ALL
def test_greedy_generation_is_the_argmax_of_the_whole_forward(variant: str) -> None:
    model, ids = model_of(**FAMILY[variant]), tokens(2, 5)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(out[:, :-1]).logits[:, 4:].argmax(-1), out[:, 5:])


@ALL
def test_padding_changes_nothing(variant: str) -> None:
    model, ids = model_of(**FAMILY[variant]), tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    with torch.no_grad():
        alone = model(ids).logits
        beside = model(padded, attention_mask=(padded != 0).long()).logits[:, 4:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)
    assert all(not routing.weights[:4].any() for layer in moe_layers(model) for routing in layer.last_routings)


@ALL
def test_saved_and_loaded(variant: str, tmp_path: Path) -> None:
    model = model_of(**FAMILY[variant])
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": loaded.config._name_or_path}
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)
    assert not any(layer.slot_counts.any() for layer in moe_layers(loaded))


@ALL
def test_recomputed_activations_give_the_same_gradients(variant: str) -> None:
    model = model_of(**FAMILY[variant]).train()
    wanted = gradients(model)
    assert {"loss", *(name for name, _ in model.named_parameters())} == wanted.keys()
    enable_recomputation(model)
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


@ALL
def test_in_bf16(variant: str) -> None:
    model = model_of(**FAMILY[variant]).train()
    wanted = model(tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens(), labels=tokens())
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert relative_error(output.logits, wanted) < 0.3  # near-ties may go to another expert
    assert model.bfloat16()(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "variant",
    [each if each in COMPILED else pytest.param(each, marks=pytest.mark.slow) for each in FAMILY],
)
def test_compiled(variant: str) -> None:
    torch._dynamo.reset()
    model = model_of(**FAMILY[variant])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@ALL
def test_in_few_bits(variant: str, tmp_path: Path) -> None:
    model = model_of(**FAMILY[variant])
    with torch.no_grad():
        before = model(tokens()).logits
        moesaic.quantize(model, "int8")
        after = model(tokens()).logits
    assert relative_error(after, before) < 0.1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(tokens()).logits, after)


@pytest.mark.parametrize("variant", ["narrow", "pre-gated layers"])
def test_experts_change_places(variant: str, tmp_path: Path) -> None:
    model = model_of(**FAMILY[variant])
    model.save_pretrained(tmp_path / "model")
    orders = {number: np.array([2, 0, 3, 1]) for number in (0, 1)}
    placed = AutoModelForCausalLM.from_pretrained(permute_experts(tmp_path / "model", orders, tmp_path / "placed"))
    torch.testing.assert_close(placed.eval()(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("chain", r"^iterations is 2: the experts of such a model cannot change places"),
        ("pre-gated stack", r"^pre_gating is 'stack': "),
        ("unequal", r"^expert_d_ffs is \["),
        ("hash", r"^router is 'hash': "),
        ("small, big or skip", r"^zero_computation_experts is \{'zero': 1\} and expert_d_ffs is "),
    ],
)
def test_experts_that_cannot_change_places(variant: str, reason: str, tmp_path: Path) -> None:
    model_of(**FAMILY[variant]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=reason):
        moe_blocks(tmp_path)


def test_parameters_that_a_token_meets_at_most() -> None:
    dense = count_parameters(model_of())
    experts = sum(p.numel() for p in moe_layers(model_of())[0].experts.parameters())
    assert dense[0] - dense[1] == 2 * experts // 2  # of two layers, half of the experts each
    twice = count_parameters(model_of(iterations=2))
    assert twice[0] - twice[1] == 0  # two of four, then perhaps the two others
    unequal = count_parameters(model_of(expert_d_ffs=[8, 8, 24, 24]))
    narrow = 3 * 32 * 8
    assert unequal[0] - unequal[1] == 2 * 2 * narrow
    skipping = count_parameters(model_of(**FAMILY["small, big or skip"]))
    assert skipping[0] - skipping[1] == 2 * 3 * 32 * 4
    stack, layers = (count_parameters(model_of(pre_gating=mode)) for mode in ("stack", "layer"))
    assert layers[0] - stack[0] == 4 * 32  # the second layer's router
    bigmac = count_parameters(model_of(communication_width=8))
    assert bigmac[0] - bigmac[1] == (dense[0] - dense[1]) // 4
