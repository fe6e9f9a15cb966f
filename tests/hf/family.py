"""Models whose layers route or compute in another way: iterated, pre-gated, with unequal or narrow experts."""

from __future__ import annotations

from typing import Any

FAMILY: dict[str, dict[str, Any]] = {
    "chain": {"iterations": 2, "num_shared_experts": 1},
    "pre-gated layers": {"pre_gating": "layer"},
    "pre-gated stack": {"pre_gating": "stack", "balancing": {"load_balancing": 0.1}},
    "unequal": {"expert_d_ffs": [8, 8, 24, 24]},
    "small, big or skip": {
        "num_experts": 2,
        "expert_d_ffs": [4, 32],
        "zero_computation_experts": {"zero": 1},
        "num_experts_per_tok": 1,
        "router_options": {"normalize": False},
    },
    "narrow": {"communication_width": 8},
    "chain of all": {
        "iterations": 2,
        "pre_gating": "layer",
        "expert_d_ffs": [8, 24, 24, 8],
        "communication_width": 8,
        "router": "sigmoid_topk",
        "balancing": {"load_balancing": 0.1, "bias_update": 0.01},
    },
    "recurrent": {"router": "recurrent", "router_options": {"state_width": 8}, "balancing": {"load_balancing": 0.1}},
    "recurrent chain": {"router": "recurrent", "router_options": {"state_width": 8}, "iterations": 2},
    "relu": {
        "router": "relu",
        "num_experts_per_tok": 4,
        "balancing": {"activation_locality": 0.1, "chunk_sparsity": 0.1},
    },
    "tsallis": {
        "router": "tsallis",
        "num_experts_per_tok": 4,
        "balancing": {"tsallis_entropy": 0.1, "load_balancing": 0.1},
    },
    "null experts": {
        "router": "null_experts",
        "num_experts_per_tok": 4,
        "zero_computation_experts": {"zero": 4},
        "balancing": {"null_load_balancing": 0.1},
    },
    "MoE++": {
        "router": "gating_residual",
        "num_experts_per_tok": 3,
        "zero_computation_experts": {"zero": 1, "copy": 1, "constant": 2},
        "balancing": {"heterogeneous_load_balancing": {"coefficient": 0.1, "tau": 0.75}},
    },
    "MoE++ chain of all": {
        "router": "gating_residual",
        "num_experts_per_tok": 3,
        "zero_computation_experts": {"constant": 2, "zero": 1},
        "iterations": 2,
        "pre_gating": "layer",
        "expert_d_ffs": [8, 24, 24, 8],
        "communication_width": 8,
        "num_shared_experts": 1,
    },
    "cosine": {"router": "cosine", "balancing": {"cosine_load_balancing": 0.1}},
    "hash": {"router": "hash", "router_options": {"vocab_size": 50}},
    "top-p": {
        "router": "top_p",
        "num_experts_per_tok": 4,
        "balancing": {"entropy": 0.1, "load_balancing": 0.1},
    },
}
