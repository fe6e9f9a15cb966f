"""Model folders with their experts in another order: the same outputs, and refusals of what is not known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hf.test_load import byte_tokenizer
from tests.reference import relative_error
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import moesaic
from moesaic.errors import CheckpointError, MoesaicError, UnsupportedError, UsageError
from moesaic.hf.load import load_model
from moesaic.hf.placement import NOTE, moe_blocks, permute_experts

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
EXPERTS = 8
MANY: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": EXPERTS, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPED = {"num_groups": 4, "top_groups": 2}
SCHEDULED = {"load_balancing": {"coefficient": 0.1, "final": 0.0, "steps": 100, "schedule": "cosine"}}
CONFIGS: dict[str, Callable[[], Any]] = {
    "ours": lambda: moesaic.MoesaicConfig(**SIZES, **MANY, head_dim=8, expert_bias=True, num_shared_experts=1),
    "ours_grouped": lambda: moesaic.MoesaicConfig(
        **SIZES, **MANY, head_dim=8, router="sigmoid_topk", router_options=GROUPED
    ),
    "ours_relu": lambda: moesaic.MoesaicConfig(
        **SIZES, **{**MANY, "num_experts_per_tok": 8}, head_dim=8, router="relu"
    ),
    "ours_recurrent": lambda: moesaic.MoesaicConfig(
        **SIZES, **MANY, head_dim=8, router="recurrent", router_options={"state_width": 16}
    ),
    "ours_cosine": lambda: moesaic.MoesaicConfig(**SIZES, **MANY, head_dim=8, router="cosine", balancing=SCHEDULED),
    "ours_noisy": lambda: moesaic.MoesaicConfig(**SIZES, **MANY, head_dim=8, router="noisy_topk"),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=EXPERTS, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **MANY, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **MANY, head_dim=8, mlp_only_layers=[1]),
    "deepseek_v2": lambda: DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy"),
    "deepseek_v3": lambda: DeepseekV3Config(**DEEPSEEK),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=8),
}
KINDS = pytest.mark.parametrize("kind", list(CONFIGS))


def made(kind: str) -> PreTrainedModel:
    """A model whose every weight is random: biases too, that are zero in a new one."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic")
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("bias")
    }
    with torch.no_grad():
        for name, tensor in tensors.items():
            if "norm" not in name:
                tensor.normal_(std=0.3 if "bias" in name else 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a model of each kind, in several files; made when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        path = root / kind
        if not path.is_dir():
            made(kind).save_pretrained(path, max_shard_size="60KB")
            byte_tokenizer().save_pretrained(path)
        return path

    return folder


def shuffled(path: Path, seed: int = 1) -> dict[int, Any]:
    """An order of the experts of every layer: groups thrown about, and the experts within each."""
    random = np.random.default_rng(seed)
    orders = {}
    for block in moe_blocks(path):
        groups = np.arange(block.num_experts).reshape(block.groups, -1)
        orders[block.number] = random.permuted(random.permutation(groups), axis=1).ravel()
    return orders


def outputs(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model, _ = load_model(path, device="cpu")
    ids = torch.randint(2, 64, (3, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return logits, told


@KINDS
def test_the_outputs_are_the_same(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = folders(kind)
    orders = shuffled(path)
    expected = {"qwen3_moe": {0, 2}, "deepseek_v2": {1, 2}, "deepseek_v3": {1, 2}}.get(kind, {0, 1, 2})
    assert orders.keys() == expected
    placed = permute_experts(path, orders, tmp_path / "placed")
    before, after = outputs(path), outputs(placed)
    assert relative_error(after[0], before[0]) < 1e-6
    assert torch.equal(after[1], before[1])


@KINDS
def test_experts_are_where_the_order_says_and_everything_else_is_as_it_was(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = folders(kind)
    orders = shuffled(path)
    permute_experts(path, orders, tmp_path / "placed")
    before = load_model(path, device="cpu")[0].state_dict()
    after = load_model(tmp_path / "placed", device="cpu")[0].state_dict()
    assert before.keys() == after.keys()
    moved = 0
    for name, tensor in before.items():
        number = int(name.split(".")[2]) if ".layers." in name else -1
        is_mine = number in orders and (".experts." in name or ".gate." in name or ".router." in name)
        stays = any(part in name for part in (".projection", ".cell.", ".log_temperature"))
        if is_mine and not stays:
            assert not torch.equal(after[name], tensor)
            tensor = tensor[torch.from_numpy(orders[number])]
            moved += 1
        assert torch.equal(after[name], tensor), name
    assert moved >= 3 * len(orders)


@pytest.mark.parametrize("kind", ["ours", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_and_scales_move(kind: str, format: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    moesaic.quantize(made(kind), format).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    permute_experts(tmp_path / "model", shuffled(tmp_path / "model"), tmp_path / "placed")
    before, after = outputs(tmp_path / "model"), outputs(tmp_path / "placed")
    assert relative_error(after[0], before[0]) < 1e-6
    assert torch.equal(after[1], before[1])


def test_the_files_stay_what_they_are(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders("olmoe"), tmp_path / "model"))
    (path / "notes.txt").write_text("kept")
    (path / "pytorch_model.bin").write_text("the same weights once more, in the old order")
    (path / "original").mkdir()
    orders = shuffled(path)
    placed = permute_experts(path, orders, tmp_path / "new" / "placed", {"ranks": 4})
    names = {file.name for file in path.iterdir()} - {"pytorch_model.bin", "original"}
    assert {file.name for file in placed.iterdir()} == names | {NOTE}
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    for name in names:
        before, after = (path / name).read_bytes(), (placed / name).read_bytes()
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(before[:8], "little")
            assert before[:header] == after[:header]
            assert len(before) == len(after)
        else:
            assert before == after
    note = json.loads((placed / NOTE).read_text())
    assert note == {"ranks": 4, "experts": {str(number): order.tolist() for number, order in orders.items()}}
    # There and back again.
    back = permute_experts(placed, {number: np.argsort(order) for number, order in orders.items()}, tmp_path / "back")
    assert all((back / name).read_bytes() == (path / name).read_bytes() for name in names)


def test_a_run_is_taken_by_its_folder_and_some_layers_may_stay(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("ours"), tmp_path / "run" / "model")
    orders = {1: shuffled(folders("ours"))[1]}
    placed = permute_experts(tmp_path / "run", orders, tmp_path / "placed")
    assert relative_error(outputs(placed)[0], outputs(tmp_path / "run")[0]) < 1e-6


def test_layers_of_a_prediction_beyond_the_last_one_are_left_alone(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders("deepseek_v3"), tmp_path / "model"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    extra = {f"model.layers.3.mlp.experts.{i}.up_proj.weight": torch.full((2, 2), float(i)) for i in range(3)}
    save_file(extra, path / "more.safetensors")
    index["weight_map"] |= dict.fromkeys(extra, "more.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [block.number for block in moe_blocks(path)] == [1, 2]
    permute_experts(path, shuffled(path), tmp_path / "placed")
    assert (tmp_path / "placed" / "more.safetensors").read_bytes() == (path / "more.safetensors").read_bytes()


def test_codes_of_others_move_in_any_precision(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The names of gpt-oss in MXFP4, and of an expert each in FP8: bytes that torch need not know how to compute."""
    tensors = flat(tmp_path / "gpt_oss", folders, "gpt_oss")
    up = "model.layers.1.mlp.experts.gate_up_proj"
    tensors.pop(up)
    tensors[f"{up}_blocks"] = torch.randint(0, 256, (EXPERTS, 6, 2, 16), dtype=torch.uint8)
    tensors[f"{up}_scales"] = torch.randint(0, 256, (EXPERTS, 6, 2), dtype=torch.uint8)
    save_file(tensors, tmp_path / "gpt_oss" / "model.safetensors")
    order = np.roll(np.arange(EXPERTS), 3)
    after = load_file(permute_experts(tmp_path / "gpt_oss", {1: order}, tmp_path / "one") / "model.safetensors")
    for name in (f"{up}_blocks", f"{up}_scales", f"{up}_bias", "model.layers.1.mlp.router.bias"):
        assert torch.equal(after[name], tensors[name][order])
    tensors = flat(tmp_path / "olmoe", folders)
    for expert in range(EXPERTS):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(3, 2)
    save_file(tensors, tmp_path / "olmoe" / "model.safetensors")
    after = load_file(permute_experts(tmp_path / "olmoe", {1: order}, tmp_path / "other") / "model.safetensors")
    for new, old in enumerate(order):
        for rest in ("weight", "weight_scale_inv"):
            moved, source = (f"model.layers.1.mlp.experts.{e}.up_proj.{rest}" for e in (new, old))
            assert torch.equal(after[moved].float(), tensors[source].float())


def test_groups_are_those_that_the_router_chooses_among(folders: Callable[[str], Path], tmp_path: Path) -> None:
    assert {block.groups for block in moe_blocks(folders("deepseek_v3"))} == {4}
    assert {block.groups for block in moe_blocks(folders("ours_grouped"))} == {4}
    assert {block.groups for block in moe_blocks(folders("olmoe"))} == {1}
    for name, change in {"all": {"topk_group": 4}, "none": {"n_group": 1, "topk_group": 1}}.items():
        path = Path(shutil.copytree(folders("deepseek_v3"), tmp_path / name))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | change))
        assert {block.groups for block in moe_blocks(path)} == {1}


def flat(path: Path, folders: Callable[[str], Path], kind: str = "olmoe") -> dict[str, torch.Tensor]:
    """A copy at ``path`` with one file; its tensors."""
    shutil.copytree(folders(kind), path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for file in folders(kind).glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, path / "model.safetensors")
    return tensors


GATE = "model.layers.1.mlp.gate.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.mlp.table": torch.zeros(64, 2)}, "layers.1.mlp.table is beside the experts"),
        ({GATE: None}, "has 0 router matrices"),
        ({GATE: torch.zeros(EXPERTS + 2, 32)}, "has 8 experts by their names, but a router of 10"),
        ({"model.layers.1.mlp.gate.bias": torch.zeros(3)}, r"gate.bias is \[3\]: not one row for each of 8"),
        ({"model.layers.1.mlp.experts.scale": torch.zeros(3)}, r"experts.scale is \[3\]: not an entry for each of 8"),
        ({"model.layers.1.other.experts.up": torch.zeros(8)}, "layer 1 has experts in two places"),
        ({UP: torch.zeros(48, 32, dtype=torch.bfloat16)}, r"cannot change places with .*: it is .*BF16 \[48, 32\]"),
        ({UP: None}, r"cannot change places with 3\.up_proj\.weight: .* missing"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    change: dict[str, torch.Tensor | None], said: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = {**flat(tmp_path / "model", folders), **change}
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "model" / "model.safetensors")
    orders = {1: np.roll(np.arange(EXPERTS), 1)}
    with pytest.raises(UnsupportedError, match=said):
        permute_experts(tmp_path / "model", orders, tmp_path / "placed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def dense(path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(path)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}, path / "model.safetensors")


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (dense, UsageError, "no MoE layer that can be placed"),
        (cut, CheckpointError, "is damaged: its tensors do not fill it"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 40), CheckpointError, "cannot be read as safe"),
        (lambda path: (path / "model.safetensors").unlink(), CheckpointError, "only safetensors can be placed"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), CheckpointError, "cannot be read"),
        (lambda path: (path / "model.safetensors.index.json").write_text("[]"), CheckpointError, "cannot be read"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}'),
            CheckpointError,
            "'.*gone' cannot be read as safetensors",
        ),
        (lambda path: shutil.rmtree(path), CheckpointError, "there is no model folder"),
    ],
)
def test_folders_that_cannot_be_placed(
    damage: Callable[[Path], object],
    error: type[MoesaicError],
    said: str,
    folders: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    flat(tmp_path / "model", folders)
    damage(tmp_path / "model")
    with pytest.raises(error, match=said):
        moe_blocks(tmp_path / "model")


@pytest.mark.parametrize(
    ("orders", "error", "said"),
    [
        ({0: np.arange(8)}, CheckpointError, "no MoE layer 0; it has 1, 2"),
        ({1: np.arange(4)}, UsageError, "no permutation of its 8 experts"),
        ({1: np.array([0, 1, 2, 3, 4, 5, 6, 6])}, UsageError, "no permutation of its 8 experts"),
        ({1: np.array([0, 2, 1, 3, 4, 5, 6, 7])}, UsageError, "tears its router's 4 groups apart"),
    ],
)
def test_orders_that_are_none(
    orders: dict[int, Any], error: type[MoesaicError], said: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        permute_experts(folders("deepseek_v3"), orders, tmp_path / "placed")
    assert not (tmp_path / "placed").exists()


def test_nothing_is_left_where_writing_fails(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        permute_experts(folders("olmoe"), {}, tmp_path / "taken")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UsageError, match=r"cannot be written: .*No space left"):
        permute_experts(folders("olmoe"), {}, tmp_path / "placed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
