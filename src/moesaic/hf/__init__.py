"""transformers: the experts implementation ``"moesaic"``, our causal language model, and its export.

Importing this registers both with transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.experts import experts_forward, is_experts_module
from moesaic.hf.export import export_qwen3_moe
from moesaic.hf.freezing import freeze
from moesaic.hf.linears import use_native_linears
from moesaic.hf.modeling import MoesaicForCausalLM, MoesaicModel
from moesaic.hf.quantization import QuantizationConfig, quantize
from moesaic.hf.rewiring import Rewirer, Rewiring

if TYPE_CHECKING:
    from moesaic.hf.state import full_state_dict, to_checkpoint

ALL_EXPERTS_FUNCTIONS.register("moesaic", experts_forward)
# Experts in 8 bits have an interface of their own. We do not run them, and say so there too.
ALL_FP8_EXPERTS_FUNCTIONS.register("moesaic", experts_forward)
AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)
AutoModel.register(MoesaicConfig, MoesaicModel, exist_ok=True)
AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)

__all__ = [
    "MoesaicConfig",
    "MoesaicForCausalLM",
    "MoesaicModel",
    "QuantizationConfig",
    "Rewirer",
    "Rewiring",
    "export_qwen3_moe",
    "freeze",
    "full_state_dict",
    "is_experts_module",
    "quantize",
    "to_checkpoint",
    "use_native_linears",
]


def __getattr__(name: str) -> Any:
    if name not in ("full_state_dict", "to_checkpoint"):
        raise AttributeError(f"module 'moesaic.hf' has no attribute {name!r}")
    from moesaic.hf import state  # its imports take a while

    return getattr(state, name)
