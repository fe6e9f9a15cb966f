"""Whole models merged: into a dense one, and into a mixture with one expert each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import dense_folder, dense_model, save
from tests.convert.test_split_memory import Allocated
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.convert.dense import check_dense
from moesaic.convert.merging import MERGES, LayerWeights, MergeSettings, likeness, merge, parse_place
from moesaic.convert.merging.run import _Merging
from moesaic.convert.meter import metered
from moesaic.convert.source import open_source
from moesaic.errors import CheckpointError, ConfigError, UnsupportedError
from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.load import load_model

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def tune(folder: Path, seed: int, family: str = "llama", **changes: Any) -> PreTrainedModel:
    """The model of seed 0 with a little noise on every weight, as fine-tuning would leave it."""
    model = dense_model(family, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    save(model, folder)
    return model


def family_of(tmp_path: Path, count: int = 2, **changes: Any) -> tuple[Path, list[Path], list[PreTrainedModel]]:
    base = dense_folder(tmp_path / "base", **changes)
    models = [tune(tmp_path / f"tuned{seed}", seed, **changes) for seed in range(1, count + 1)]
    return base, [tmp_path / f"tuned{seed}" for seed in range(1, count + 1)], models


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_average_is_a_dense_model_like_its_base(tmp_path: Path, family: str) -> None:
    base, folders, models = family_of(tmp_path, family=family)
    made = merge(base, tmp_path / "out", MergeSettings(folders))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(merged) is type(models[0]) and made.experts == 0
    assert made.active_parameters == 2 * 3 * 32 * 48
    for (name, got), *tuned in zip(merged.named_parameters(), *(m.parameters() for m in models), strict=True):
        assert torch.allclose(got, sum(tuned) / 2, atol=1e-6), name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    load_model(tmp_path / "out")


def test_every_method_goes_through_the_same_door(tmp_path: Path) -> None:
    base, folders, models = family_of(tmp_path)
    for number, (by, options) in enumerate(
        [("ties", {"density": 0.5}), ("dare", {"density": 0.5}), ("breadcrumbs", {}), ("consensus", {}), ("slerp", {})]
    ):
        merge(base, tmp_path / str(number), MergeSettings(folders, by=by, options=options))
        got, before, one = (state(folder) for folder in (tmp_path / str(number), base, folders[0]))
        apart = sum(float((got[name] - before[name]).square().sum()) for name in before)
        tuning = sum(float((one[name] - before[name]).square().sum()) for name in before)
        assert 0 < apart < 2 * tuning, by
    assert len(models) == 2


def test_layers_may_have_weights_of_their_own(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path)
    special = {"1": (1.0, 0.0), "1:ffn": (0.0, 1.0), "outside": (0.0, 0.0)}
    settings = MergeSettings(folders, by="task_arithmetic", layer_weights=special)
    merge(base, tmp_path / "out", settings)
    got, before, one, two = (state(folder) for folder in (tmp_path / "out", base, *folders))
    for name, tensor in got.items():
        if name.startswith("model.layers.1.mlp.") or name == "model.layers.1.post_attention_layernorm.weight":
            wanted = two[name]
        elif name.startswith("model.layers.1."):
            wanted = one[name]
        elif name.startswith("model.layers.0."):
            wanted = (one[name] + two[name]) / 2
        else:
            wanted = before[name]
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_places() -> None:
    weights = LayerWeights.of((1.0,), {"2-3:attention": (2.0,), "3": (3.0,)}, 5)
    assert weights["model.layers.2.self_attn.q_proj.bias"] == (2.0,)
    assert weights["model.layers.2.input_layernorm.weight"] == (2.0,)
    assert weights["model.layers.2.mlp.up_proj.weight"] == (1.0,)
    assert weights["model.layers.3.self_attn.q_proj.weight"] == (3.0,)
    assert weights["model.layers.30.self_attn.q_proj.weight"] == (1.0,)
    assert weights["lm_head.weight"] == (1.0,)
    for text, message in [
        ("x", "says no layers: allowed are '3', '0-9'"),
        ("outside:ffn", "says no layers"),
        ("1:mlp", "names no half of a layer: allowed are ':attention' and ':ffn'"),
        ("3-5", "the model has 0 to 4"),
        ("3-2", "says layers that are not there"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_place(text, 5)


def test_the_feed_forwards_become_experts_and_the_rest_is_averaged(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path, tie_word_embeddings=True)
    made = merge(base, tmp_path / "out", MergeSettings(folders, into="experts"))
    assert made.experts == 3 and made.active_parameters == 2 * 2 * 3 * 32 * 48
    got, branches = state(tmp_path / "out"), [state(folder) for folder in (base, *folders)]
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        for expert, branch in enumerate(branches):
            up = torch.cat([branch[f"{mlp}.gate_proj.weight"], branch[f"{mlp}.up_proj.weight"]])
            assert torch.equal(got[f"{mlp}.experts.up"][expert], up)
            assert torch.equal(got[f"{mlp}.experts.down"][expert], branch[f"{mlp}.down_proj.weight"])
    for name in set(got) & set(branches[0]):
        assert torch.allclose(got[name], sum(branch[name] for branch in branches) / 3, atol=1e-6), name
    moe, _ = load_model(tmp_path / "out")
    assert isinstance(moe, MoesaicForCausalLM) and moe.config.num_experts == 3
    assert torch.isfinite(logits(moe)).all()


def test_a_mixture_of_equal_models_is_that_model(tmp_path: Path) -> None:
    dense = dense_model("qwen3")
    folder = save(dense, tmp_path / "base")
    merge(folder, tmp_path / "out", MergeSettings([folder, folder], into="experts", with_base=False, top_k=1))
    moe, _ = load_model(tmp_path / "out")
    assert moe.config.num_experts == 2
    assert float((logits(moe) - logits(dense)).norm() / logits(dense).norm()) < 1e-5


def test_a_mixture_may_merge_the_rest_in_another_way(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path)
    settings = MergeSettings(folders, into="experts", by="task_arithmetic", weights=(0, 1, 0))
    merge(base, tmp_path / "out", settings)
    got, one = state(tmp_path / "out"), state(folders[0])
    for name in set(got) & set(one):
        assert torch.allclose(got[name], one[name], atol=1e-6), name


def test_another_precision_is_rounded_to_the_base_s(tmp_path: Path) -> None:
    base = save(dense_model().to(torch.bfloat16), tmp_path / "base")
    tune(tmp_path / "tuned", 1)
    merge(base, tmp_path / "out", MergeSettings([tmp_path / "tuned"]))
    got, wanted = state(tmp_path / "out"), state(tmp_path / "tuned")
    assert all(tensor.dtype == torch.bfloat16 for tensor in got.values())
    assert all(torch.allclose(tensor.float(), wanted[name], rtol=0.02, atol=0.02) for name, tensor in got.items())


@pytest.mark.parametrize("by", [*MERGES])
def test_models_in_bfloat16_are_merged_in_float32(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tied embeddings stay so."""
    monkeypatch.setattr(_Merging, "_rows", lambda *_: 5)  # random masks are drawn for each piece
    base, folders, _ = family_of(tmp_path, tie_word_embeddings=True)
    rounded = [altered(folder, tmp_path / f"half{n}", torch.bfloat16) for n, folder in enumerate((base, *folders))]
    whole = [altered(folder, tmp_path / f"whole{n}", torch.float32) for n, folder in enumerate(rounded)]
    for name, (first, *others) in {"one": rounded, "other": whole}.items():
        merge(first, tmp_path / name, MergeSettings(others, by=by))
    one, other = state(tmp_path / "one"), state(tmp_path / "other")
    assert one.keys() == other.keys() == state(base).keys() and "lm_head.weight" not in one
    assert all(torch.equal(tensor, other[name].bfloat16()) for name, tensor in one.items())


def altered(folder: Path, into: Path, dtype: torch.dtype | None = None, **changes: Any) -> Path:
    """A copy with other tensors: of another dtype, or changed by a function of each name."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    tensors = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    for name, change in changes.items():
        name = name.replace("__", ".")
        tensors[name] = change(tensors.get(name))
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


GATE = "model__layers__1__mlp__gate_proj__weight"


def test_buffers_that_are_computed_are_left_out_and_whole_numbers_refused(tmp_path: Path) -> None:
    base, (folder,), _ = family_of(tmp_path, count=1)
    inverse = {"model__layers__0__self_attn__rotary_emb__inv_freq": lambda _: torch.ones(4)}
    merge(altered(base, tmp_path / "old", **inverse), tmp_path / "out", MergeSettings([folder]))
    assert state(tmp_path / "out").keys() == state(base).keys()
    whole = altered(folder, tmp_path / "whole", **{GATE: lambda tensor: tensor.to(torch.int8)})
    with pytest.raises(UnsupportedError, match=r"whole' has model.layers.1.mlp.gate_proj.weight as torch.int8"):
        merge(base, tmp_path / "none", MergeSettings([folder, whole]))


@pytest.mark.parametrize(("into", "by"), [("dense", "ties"), ("dense", "linear"), ("experts", "linear")])
def test_values_that_are_not_finite_are_told(tmp_path: Path, into: str, by: str) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[40, 3] = float("nan")
        return tensor

    base, (folder,), _ = family_of(tmp_path, count=1)
    bad = altered(folder, tmp_path / "bad", **{GATE: spoil})
    message = r"bad' is damaged: model.layers.1.mlp.gate_proj.weight holds values that are not finite"
    with pytest.raises(CheckpointError, match=message):
        merge(base, tmp_path / "out", MergeSettings([folder, bad], into=into, by=by))


def test_a_merge_beyond_its_precision_is_told(tmp_path: Path) -> None:
    base, (folder,), _ = family_of(tmp_path, count=1)
    half = altered(base, tmp_path / "half", torch.float16)
    settings = MergeSettings([folder], by="task_arithmetic", weights=(1e8,))
    with pytest.raises(ConfigError, match=r"merged by \[100000000.0\] is too large for float16: give smaller weights"):
        merge(half, tmp_path / "out", settings)


def test_only_the_same_models_are_gone_on_with(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path)
    settings, out = MergeSettings(folders, by="ties"), tmp_path / "out"

    def stop(line: str) -> None:
        if "(3 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, out, settings, say=stop, shard_bytes=20_000)
    changed = {GATE: lambda tensor: tensor + 0.01}  # with the fingerprint that it had
    other = altered(folders[1], tmp_path / "other", **changed)
    with pytest.raises(CheckpointError, match=r"with other settings \(models: "):
        merge(base, out, MergeSettings([folders[0], other], by="ties"), shard_bytes=20_000)
    with pytest.raises(CheckpointError, match=r"with other settings \(models: "):
        merge(base, out, MergeSettings(folders[::-1], by="ties"), shard_bytes=20_000)
    with pytest.raises(CheckpointError, match=r"with other settings \(model: .*remove .*out.partial'"):
        merge(altered(base, tmp_path / "base2", **changed), out, settings, shard_bytes=20_000)
    moved = [Path(shutil.copytree(folder, tmp_path / f"moved{n}")) for n, folder in enumerate(folders)]
    assert merge(base, out, MergeSettings(moved, by="ties"), shard_bytes=20_000).written.resumed == 2


def test_an_interrupted_start_goes_on_to_the_same_model(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path)
    settings = MergeSettings(folders, by="dare")
    merge(base, tmp_path / "whole", settings, shard_bytes=20_000)

    def stop(line: str) -> None:
        if "(3 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, tmp_path / "out", settings, say=stop, shard_bytes=20_000)
    with pytest.raises(CheckpointError, match="unfinished conversion with other settings"):
        merge(base, tmp_path / "out", MergeSettings(folders, by="dare", seed=1), shard_bytes=20_000)
    assert merge(base, tmp_path / "out", settings, shard_bytes=20_000).written.resumed == 2
    whole, resumed = state(tmp_path / "whole"), state(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("into", ["dense", "experts"])
def test_memory_does_not_grow_with_the_models(tmp_path: Path, into: str) -> None:
    changes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    base, folders, _ = family_of(tmp_path, count=4, **changes)
    ffn = 4 * 3 * 64 * 128
    layer, shard = (ffn, 4 * 260 * 64) if into == "dense" else (5 * ffn, 5 * ffn * 2 // 3)
    with metered() as meter:
        by = "ties" if into == "dense" else "linear"
        merge(base, tmp_path / "out", MergeSettings(folders, into=into, by=by), shard_bytes=shard)
    assert shard < meter.peak < 1.3 * layer + shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("by", "count"), [("ties", 1), ("ties", 2), ("slerp", 1), ("dare_ties", 2)])
def test_memory_of_every_intermediate_result(tmp_path: Path, by: str, count: int, dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    found, others, _ = family_of(tmp_path, count=count, **changes)
    base, *folders = (altered(folder, tmp_path / f"as{n}", dtype) for n, folder in enumerate([found, *others]))
    ffn = 3 * 128 * 512 * dtype.itemsize
    with Allocated() as everything:
        merge(base, tmp_path / "out", MergeSettings(folders, by=by), shard_bytes=ffn)
    assert 0.5 * ffn < everything.meter.peak < 1.3 * ffn + ffn


def test_models_of_another_base_are_refused(tmp_path: Path) -> None:
    base = dense_folder(tmp_path / "base")
    tune(tmp_path / "tuned", 1)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("llama", {"seed": 7}, r"was not fine-tuned from the base .*fingerprints differ .*nothing in common \(cosine"),
        ("qwen3", {}, "is a 'qwen3', the base .* a 'llama': models of one base"),
        ("llama", {"num_hidden_layers": 3}, "it has 3 layers, the base has 2"),
        ("llama", {"intermediate_size": 64}, r"gate_proj.weight has shape \[64, 32\] there, \[48, 32\] in the base"),
        ("llama", {"vocab_size": 300}, r"embed_tokens.weight has shape \[300, 32\] there"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight is in the base only"),
        ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001 there, 1e-06 here"),
        ("llama", {"num_key_value_heads": 4}, "k_proj.weight has shape"),
        ("llama", {"attention_bias": True}, "q_proj.bias is in it only"),
    ]
    for number, (family, changes, message) in enumerate(cases):
        other = dense_folder(tmp_path / str(number), family, **changes)
        for models in ([other], [tmp_path / "tuned", other]):
            with pytest.raises(CheckpointError, match=message):
                merge(base, tmp_path / "out", MergeSettings(models))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_models_with_other_tokens_are_refused(tmp_path: Path) -> None:
    base, (folder,), _ = family_of(tmp_path, count=1)
    told = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"tokenizers differ, the id \d+ is 'b' there, 'a' in the base"):
        merge(base, tmp_path / "out", MergeSettings([folder]))
    without = tmp_path / "without"
    without.mkdir()
    for path in folder.iterdir():
        (without / path.name).write_bytes(path.read_bytes())
    (without / "tokenizer.json").unlink()  # none to be had: nothing to compare
    (without / "tokenizer_config.json").unlink()
    merge(base, tmp_path / "unchecked", MergeSettings([without]))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json' is damaged"):
        merge(base, tmp_path / "out", MergeSettings([folder]))


def test_tokens_of_unigram_tokenizers_are_compared_too(tmp_path: Path) -> None:
    base, (folder,), _ = family_of(tmp_path, count=1)
    for path, tokens in [(base, ["a", "b"]), (folder, ["a", "c"])]:
        told = {"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}, "added_tokens": []}
        (path / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="tokenizers differ, the id 1 is 'c' there, 'b' in the base"):
        merge(base, tmp_path / "out", MergeSettings([folder]))


def test_a_mixture_cannot_be_merged(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path)
    merge(base, tmp_path / "moe", MergeSettings(folders, into="experts"))
    with pytest.raises(UnsupportedError, match="is a mixture of experts already"):
        merge(base, tmp_path / "out", MergeSettings([tmp_path / "moe"]))


def test_likeness_tells_fine_tuned_from_foreign(tmp_path: Path) -> None:
    base, (folder,), _ = family_of(tmp_path, count=1)
    ours, tuned, foreign = (
        check_dense(open_source(path)) for path in (base, folder, dense_folder(tmp_path / "foreign", seed=3))
    )
    assert likeness(ours, ours) == pytest.approx(1) and likeness(ours, tuned) > 0.95
    assert abs(likeness(ours, foreign)) < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "needs models that were fine-tuned from the base"),
        ({"models": "one"}, "needs models that were fine-tuned from the base"),
        ({"into": "expert"}, "into is 'expert': did you mean 'experts'"),
        ({"by": "average"}, "unknown merge method 'average'"),
        ({"weights": (1.0,)}, "weights has 1 numbers for 2 models"),
        ({"into": "experts", "weights": (1.0, 1.0)}, r"weights \(the base's is the first\) has 2 numbers for 3 models"),
        ({"layer_weights": {"0": (1.0,)}}, "layer_weights of '0' has 1 numbers for 2 models"),
        ({"into": "experts", "top_k": 4}, "top_k is 4: it must be at least 1 and at most num_experts = 3"),
        ({"into": "experts", "models": ["a"], "with_base": False}, "a mixture needs two experts"),
        ({"by": "slerp", "models": ["a", "b", "c"]}, "'slerp' takes 1 to 2"),
        ({"seed": 0.5}, "seed is 0.5: it must be a whole number"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MergeSettings(**{"models": ["a", "b"], **settings})


def test_layers_that_are_not_there_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, folders, _ = family_of(tmp_path)
    with pytest.raises(ConfigError, match="'0-9' says layers that are not there: the model has 0 to 1"):
        merge(base, tmp_path / "out", MergeSettings(folders, layer_weights={"0-9": (1, 0)}))
    assert not (tmp_path / "out.partial").exists()
