"""Export to Qwen3-MoE: plain transformers computes the same; what it cannot express is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hf.tiny import EXPERTS, SIZES
from transformers import Qwen3MoeForCausalLM

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.errors import UnsupportedError
from moesaic.hf import export_qwen3_moe
from moesaic.hf.export import obstacles

PERMITTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights as they are": {"router_options": {"normalize": False}},
    "tied embeddings": {"tie_word_embeddings": True},
    "some layers dense": {"mlp_only_layers": [1]},
    "every second layer dense": {"decoder_sparse_step": 2},
    "balanced": {"balancing": {"load_balancing": 0.02, "z_loss": 0.01}},
    "attention bias, window, long context": {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    },
    "heads wider than their share": {"head_dim": 16},
    "bfloat16": {"dtype": torch.bfloat16},
}


def model_of(**changes: Any) -> MoesaicForCausalLM:
    torch.manual_seed(0)
    dtype = changes.pop("dtype", torch.float32)
    return MoesaicForCausalLM(MoesaicConfig(**{**SIZES, **EXPERTS, **changes})).to(dtype).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


PLAIN_TRANSFORMERS = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    ids = load_file(folder / "ids.safetensors")["ids"]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        save_file({"logits": model(ids).logits.contiguous()}, folder / "logits.safetensors")
assert not any(name.partition(".")[0] == "moesaic" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a permitted variant, with the logits that a process without moesaic computed from it."""
    root = tmp_path_factory.mktemp("exported")
    for name, changes in PERMITTED.items():
        export_qwen3_moe(model_of(**changes)).save_pretrained(root / name)
        save_file({"ids": ids()}, root / name / "ids.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS, str(root)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("variant", PERMITTED)
def test_plain_transformers_computes_the_same(variant: str, exported: Path) -> None:
    got = load_file(exported / variant / "logits.safetensors")["logits"]
    model = model_of(**PERMITTED[variant])
    with torch.no_grad():
        wanted = model(ids()).logits
    assert got.dtype == wanted.dtype
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    assert (got.float() - wanted.float()).norm() < tolerance * wanted.float().norm()


@pytest.mark.parametrize("variant", PERMITTED)
def test_in_this_process_too(variant: str) -> None:
    model = model_of(**PERMITTED[variant])
    plain = export_qwen3_moe(model)
    assert type(plain) is Qwen3MoeForCausalLM
    assert not plain.training
    with torch.no_grad():
        got, wanted = plain(ids()).logits, model(ids()).logits
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    assert (got.float() - wanted.float()).norm() < tolerance * wanted.float().norm()


def test_nothing_is_copied() -> None:
    model = model_of()
    plain = export_qwen3_moe(model)
    assert plain.model.layers[0].mlp.experts.gate_up_proj.data_ptr() == model.model.layers[0].mlp.experts.up.data_ptr()


def test_settings_that_training_goes_on_with() -> None:
    plain = export_qwen3_moe(model_of(balancing={"load_balancing": 0.02}, router_options={"normalize": False}))
    assert plain.config.norm_topk_prob is False
    assert plain.config.architectures == ["Qwen3MoeForCausalLM"]
    assert not set(plain.config.to_dict()) & {"router", "router_options", "balancing", "capacity_factor"}


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dense", [[], [1]])
def test_the_balancing_loss_has_the_same_size(top_k: int, dense: list[int]) -> None:
    """The two differ where layers are uneven in different ways; with nearly even loads they agree."""
    changes = {"num_hidden_layers": 3, "mlp_only_layers": dense, "num_experts_per_tok": top_k}
    model = model_of(**changes, balancing={"load_balancing": 0.02}, initializer_range=0.02)
    plain = export_qwen3_moe(model)
    many = torch.randint(0, 50, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(many).aux_loss
        theirs = plain.config.router_aux_loss_coef * plain(many, output_router_logits=True).aux_loss
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0)


@pytest.mark.parametrize(("table", "coefficient"), [({}, 0.02), ({"final": 0.5, "steps": 9}, 0.5)])
def test_a_balancing_loss_with_a_schedule_goes_on_where_it_ends(table: dict[str, Any], coefficient: float) -> None:
    plain = export_qwen3_moe(model_of(balancing={"load_balancing": {"coefficient": 0.02, **table}}))
    assert plain.config.router_aux_loss_coef == pytest.approx(coefficient * 2 / 2)  # two layers, two experts a token


def test_without_a_balancing_loss_there_is_none() -> None:
    assert export_qwen3_moe(model_of(balancing={"z_loss": 0.1})).config.router_aux_loss_coef == 0.0


FORBIDDEN: list[tuple[dict[str, Any], str]] = [
    ({"router": "sigmoid_topk"}, "router is 'sigmoid_topk', only 'softmax_topk' is possible"),
    ({"expert_activation": "geglu"}, "expert_activation is 'geglu', only 'swiglu' is possible"),
    ({"expert_bias": True}, "expert_bias is True, only False is possible"),
    ({"num_shared_experts": 2}, "num_shared_experts is 2, only 0 is possible"),
    ({"capacity_factor": 1.25}, "capacity_factor is 1.25, only 0.0 is possible"),
    ({"capacity_factor": -1.0}, "capacity_factor is -1.0, only 0.0 is possible"),
    ({"zero_computation_experts": {"copy": 2}}, "zero_computation_experts is {'copy': 2}, only {} is possible"),
    ({"iterations": 2}, "iterations is 2, only 1 is possible"),
    ({"pre_gating": "layer"}, "pre_gating is 'layer', only 'none' is possible"),
    ({"qk_norm": False}, "qk_norm is False, only True is possible"),
    (
        {"attention_bias": True, "attention_output_bias": False},
        "attention_output_bias is False, only attention_bias = True is possible",
    ),
    (
        {"hidden_act": "gelu", "mlp_only_layers": [0]},
        "hidden_act of the dense layers is 'gelu', only 'silu' is possible",
    ),
    (
        {"hidden_act": "gelu", "decoder_sparse_step": 2},
        "hidden_act of the dense layers is 'gelu', only 'silu' is possible",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FORBIDDEN, ids=[str(changes) for changes, _ in FORBIDDEN])
def test_what_cannot_be_expressed_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        export_qwen3_moe(model_of(**changes))
    assert str(caught.value) == f"this model cannot be written as Qwen3-MoE: {message}"


def test_all_obstacles_at_once() -> None:
    model = model_of(router="sigmoid_topk", expert_bias=True, num_shared_experts=1)
    assert len(obstacles(model.config)) == 3


def test_an_activation_that_nobody_uses_is_no_obstacle() -> None:
    assert obstacles(model_of(hidden_act="gelu").config) == []
