"""A pruned model computes what the old one does when its routers do not take the experts that went, in plain
transformers too; and what its routers cannot have is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.convert.mixtures import mixture, mixture_folder, text_file
from tests.convert.models import save
from tests.convert.test_pruning import refused, settings
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.convert.pruning import prune
from moesaic.convert.writing import partial_path
from moesaic.errors import CheckpointError, DataError, UnsupportedError
from moesaic.hf.load import load_config

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK: dict[str, Any] = {
    **LATENT,
    "n_routed_experts": 6,
    "num_local_experts": 6,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_file(tmp_path_factory.mktemp("text") / "words.txt"))


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(60).view(3, 20) * 37 % 256
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@contextmanager
def without(gates: dict[int, list[int]]) -> Iterator[None]:
    """While it lasts, a linear layer with one of these weights (by ``id``) gives minus infinity for some outputs."""
    linear = F.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        if id(weight) in gates:
            y = y.clone()
            y[..., gates[id(weight)]] = -torch.inf
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", masked)
        yield


@pytest.mark.parametrize(
    ("family", "changes", "keep"),
    [
        ("mixtral", {}, 3),
        ("qwen3_moe", {"norm_topk_prob": True}, 4),
        ("qwen3_moe", {"norm_topk_prob": False}, 4),
        ("olmoe", {"norm_topk_prob": True}, 2),
        ("qwen2_moe", {"norm_topk_prob": False}, 5),
        ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"}, 4),
        ("deepseek_v3", {**DEEPSEEK, "norm_topk_prob": True}, 4),
        ("deepseek_v3", {**DEEPSEEK, "n_group": 3, "topk_group": 3}, 4),
    ],
)
def test_plain_transformers_reads_it(
    family: str, changes: dict[str, Any], keep: int, tmp_path: Path, text: str
) -> None:
    model = mixture(family, seed=6, **changes)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.3)
    done = prune(save(model, tmp_path / "all"), tmp_path / "few", settings(text, keep=keep))
    pruned, told = AutoModelForCausalLM.from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not any(told.values()) and type(pruned) is type(model)
    whole, gates = logits(model), {}
    for number, layer in done.layers.items():
        gone = sorted(set(range(6)) - {group[0] for group in layer.groups})
        block = model.model.layers[number].mlp  # type: ignore[index,union-attr]
        gates[id(block.gate.weight)] = gone  # type: ignore[union-attr]
        if (bias := getattr(block.gate, "e_score_correction_bias", None)) is not None:  # type: ignore[union-attr]
            bias.data[gone] = -1e9
    with without(gates):
        expected = logits(model)
    assert difference(logits(pruned), expected) < 1e-5
    assert difference(whole, expected) > 0.01


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("softmax_topk", {}),
        ("sigmoid_topk", {"num_groups": 3, "top_groups": 3}),
        ("cosine", {}),
        ("recurrent", {"state_width": 8}),
        ("relu", {"eps": 0.1}),
        ("top_p", {}),
        ("null_experts", {}),
        ("unit_topk", {}),
    ],
)
def test_our_routers(router: str, options: dict[str, Any], tmp_path: Path, text: str) -> None:
    model = mixture("moesaic", seed=7, router=router, router_options=options)
    done = prune(save(model, tmp_path / "all"), tmp_path / "few", settings(text))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "few")
    for number, layer in done.layers.items():
        own = model.model.layers[number].mlp.router  # type: ignore[index,union-attr]
        own.logit_shift = torch.zeros(own.logits(torch.zeros(1, getattr(own, "state_width", 32))).shape[1])  # type: ignore
        own.logit_shift[list(set(range(6)) - {group[0] for group in layer.groups})] = -1e9  # type: ignore[index]
    assert difference(logits(pruned), logits(model)) < 1e-5


def test_a_router_that_hangs_on_the_number_of_experts(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mixture_folder(tmp_path / "all", "moesaic", router="cosine")
    monkeypatch.setattr("moesaic.convert.pruning.pruned_config", lambda config, before, keep: fewer(config, keep))
    refused(UnsupportedError, r"router.weight would be \[4, 3\], its model has it \[4, 2\]", folder, settings(text))


def fewer(config: Any, keep: int) -> Any:
    config.num_experts = keep
    return config


def test_how_many_experts_a_token_takes_must_be_known(tmp_path: Path, text: str) -> None:
    folder = mixture_folder(tmp_path / "all", "deepseek_v2", **{**DEEPSEEK, "topk_method": "greedy"})
    config = load_config(folder)
    config.num_experts_per_tok = None
    config.save_pretrained(folder)
    refused(
        UnsupportedError,
        "does not say how many experts a token takes: known are num_experts_per_tok",
        folder,
        settings(text),
    )


@pytest.mark.parametrize("by", ["reap", "usage", "similarity"])
def test_values_that_are_not_finite(by: str, tmp_path: Path, text: str) -> None:
    model = mixture("mixtral")
    damage(model)
    folder = save(model, tmp_path / "all")
    message = r"what the experts of layer 1 compute is not finite on the text: weights there or before"
    refused(CheckpointError, message, folder, settings(text, by=by))
    alike = settings(text, by=by, how="merge", similarity="weights")
    refused(CheckpointError, "is not finite on the text", folder, alike)


def damage(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("nan"))  # type: ignore[index,union-attr]


def test_a_damaged_choice_is_told(tmp_path: Path, text: str) -> None:
    folder = mixture_folder(tmp_path / "all", "olmoe")

    def stop(line: str) -> None:
        if line.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "few", settings(text), say=stop)
    choice = partial_path(tmp_path / "few") / "work" / "choice.json"
    choice.write_text(choice.read_text()[:20])
    with pytest.raises(CheckpointError, match=r"choice.json' is damaged: .* to begin anew, remove .*few.partial"):
        prune(folder, tmp_path / "few", settings(text))


def test_a_trace_that_is_too_short(tmp_path: Path) -> None:
    from tests.convert.test_pruning import trace_of

    from moesaic.convert.pruning import PruneSettings

    folder = mixture_folder(tmp_path / "all", "mixtral")
    trace = trace_of(folder, {0: [20] * 6, 1: [15] * 6}).save(tmp_path / "t.npz")
    short = PruneSettings(keep=4, by="usage", trace=str(trace))
    refused(DataError, "the trace has 120 tokens, so that an expert of layer 1 is taken 15.0 times", folder, short)
