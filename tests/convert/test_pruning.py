"""Pruned mixtures against what loops say, in every family, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.convert.mixtures import FAMILIES, mixture, mixture_folder, text_file
from tests.convert.models import dense_folder, save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.convert import open_source
from moesaic.convert.meter import metered
from moesaic.convert.pruning import Pruned, PruneSettings, prune
from moesaic.convert.writing import partial_path
from moesaic.errors import CheckpointError, ConfigError, DataError, MoesaicError, UnsupportedError
from moesaic.hf.load import load_model
from moesaic.hf.placement import moe_blocks
from moesaic.inspect import LayerTrace, ModelFacts, Passage, RoutingTrace

LENGTH = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_file(tmp_path_factory.mktemp("text") / "words.txt"))


def settings(text: str, **changes: Any) -> PruneSettings:
    return PruneSettings(**{"keep": 4, "data": (text,), "tokens": 256, "sequence_length": LENGTH, **changes})


def calibration_ids(folder: Path, text: str) -> Tensor:
    """The tokens that pruning looks at, as it is documented: passages one after the other."""
    from moesaic.convert.activations import read_text

    read = read_text(open_source(folder), [text], tokens=256, sequence_length=LENGTH, held_out=0.0)
    ids = torch.cat(read.passages)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def blocks_of(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        if hasattr(layer.mlp, "experts"):
            yield number, layer.mlp


def one_expert(model: PreTrainedModel, block: Any, expert: int, x: Tensor) -> Tensor:
    """An expert spelled out, in float64."""
    if model.config.model_type == "gpt_oss":
        both = x @ block.experts.gate_up_proj[expert].double() + block.experts.gate_up_proj_bias[expert].double()
        gate, up = both[..., ::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ block.experts.down_proj[expert].double() + block.experts.down_proj_bias[expert].double()
    ours = model.config.model_type == "moesaic"
    stacked = block.experts.up if ours else block.experts.gate_up_proj
    down = (block.experts.down if ours else block.experts.down_proj)[expert].double()
    gate, up = stacked[expert].double().chunk(2)
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def watched(model: PreTrainedModel, ids: Tensor) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
    """Of each MoE layer what enters its experts and which of them tokens take with what weight, by the whole model."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for number, block in blocks_of(model):
        seen[number] = []
        if model.config.model_type == "moesaic":
            block.register_forward_hook(
                lambda layer, args, out, own=seen[number]: own.append(
                    (args[0].flatten(0, -2), layer.last_routing.expert_ids, layer.last_routing.weights)
                )
            )
        else:
            block.experts.register_forward_pre_hook(lambda module, args, own=seen[number]: own.append(args))  # type: ignore[union-attr]
    with torch.no_grad():
        model(input_ids=ids)
    return seen


def brute_force(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Counts, REAP's saliency and mean outputs of each layer's experts, token by token."""
    found = {}
    for number, calls in watched(model, ids).items():
        counts, saliency = np.zeros(6), np.zeros(6)
        sums = np.zeros((6, 32))
        block = dict(blocks_of(model))[number]
        for x, chosen, weights in calls:
            for t in range(len(x)):
                for k in range(chosen.shape[1]):
                    e = int(chosen[t, k])
                    counts[e] += 1
                    length = one_expert(model, block, e, x[t].double()).norm()
                    saliency[e] += float((weights[t, k].double() * length).detach())
            sampled = range(0, len(x), max(1, len(x) // 256))[:256]
            for t in sampled:
                for e in range(6):
                    sums[e] += one_expert(model, block, e, x[t].double()).detach().numpy()
        found[number] = counts, saliency / np.maximum(counts, 1), sums / len(sampled)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_with_the_least_saliency_go(family: str, tmp_path: Path, text: str) -> None:
    model = mixture(family)
    folder = save(model, tmp_path / "all")
    done = prune(folder, tmp_path / "few", settings(text))
    expected = brute_force(model, calibration_ids(folder, text))
    assert set(done.layers) == set(expected)
    for number, (counts, saliency, _) in expected.items():
        best = sorted(np.argsort(-saliency)[:4].tolist())
        assert done.layers[number].groups == [[e] for e in best]
        assert done.layers[number].kept == pytest.approx(counts[best].sum() / counts.sum())
    assert (done.before, done.after, done.aligned) == (6, 4, False)
    check_dropped(folder, tmp_path / "few", model, done)


def check_dropped(folder: Path, out: Path, model: PreTrainedModel, done: Pruned) -> None:
    """The pruned model is the old one whose router never takes the dropped experts."""
    pruned, tokenizer = load_model(out, device="cpu")
    assert type(pruned) is type(model)
    assert tokenizer.encode("one two") == load_model(folder, device="cpu")[1].encode("one two")
    counts = [getattr(pruned.config, name, None) for name in ("num_experts", "num_local_experts")]
    assert 4 in counts and 6 not in counts
    for number, block in blocks_of(model):
        gone = set(range(6)) - {group[0] for group in done.layers[number].groups}
        router: Any = getattr(block, "gate", None) or block.router  # type: ignore[union-attr]
        if router.bias is not None if hasattr(router, "bias") else False:
            router.bias.data[list(gone)] = -1e9
            continue
        router.register_forward_hook(without(gone, router))
    ids = torch.randint(0, 256, (3, 20))
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, pruned(input_ids=ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5


def without(gone: set[int], router: Any) -> Any:
    """A router's answer when the experts ``gone`` are not to be had, from its logits."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        logits = F.linear(args[0].reshape(-1, 32).float(), module.weight.float())
        logits[:, list(gone)] = -torch.inf
        weights, ids = logits.softmax(dim=-1).topk(2, dim=-1)
        if getattr(module, "norm_topk_prob", True):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if isinstance(output, tuple):
            return logits, weights, ids
        output.expert_ids, output.weights = ids, weights
        return output

    return hook


@pytest.mark.parametrize("family", ["olmoe", "moesaic"])
def test_usage_keeps_those_that_are_taken_most(family: str, tmp_path: Path, text: str) -> None:
    model = mixture(family, seed=1)
    folder = save(model, tmp_path / "all")
    done = prune(folder, tmp_path / "few", settings(text, by="usage", keep=None, share=0.5))
    for number, (counts, _, _) in brute_force(model, calibration_ids(folder, text)).items():
        assert done.layers[number].groups == [[int(e)] for e in sorted(np.argsort(-counts, kind="stable")[:3])]


def trace_of(folder: Path, counts: dict[int, list[int]]) -> RoutingTrace:
    """A trace of the model in ``folder`` in which layer l's expert e was taken ``counts[l][e]`` times."""
    tokens = max(sum(own) for own in counts.values())
    layers = []
    for number, own in counts.items():
        ids = np.full((tokens, 1), len(own), dtype=np.int64)
        ids[: sum(own), 0] = np.repeat(np.arange(len(own)), own)
        layers.append(LayerTrace("mlp", number, len(own), ids, np.ones((tokens, 1)), np.zeros(tokens), "scores"))
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    zeros = np.zeros(tokens, dtype=np.int64)
    spans = np.zeros((tokens, 2), dtype=np.int64)
    facts = ModelFacts("m", architecture, 2, 1, 1)
    return RoutingTrace(facts, [Passage("a", "d", "", 0, tokens)], zeros, spans, {0: "x"}, layers)


def test_a_saved_trace_says_what_is_used(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "all", "mixtral")
    trace = trace_of(folder, {0: [25, 45, 5, 0, 35, 10], 1: [8, 16, 24, 32, 40, 48]}).save(tmp_path / "t.npz")
    done = prune(folder, tmp_path / "few", PruneSettings(keep=3, by="usage", trace=str(trace)))
    assert done.layers[0].groups == [[0], [1], [4]]
    assert done.layers[1].groups == [[3], [4], [5]]
    assert done.layers[0].kept == pytest.approx(21 / 24)


def linked(points: np.ndarray, keep: int) -> list[list[int]]:
    """Average linkage, spelled out."""
    found = [[e] for e in range(len(points))]
    while len(found) > keep:
        pairs = [(i, j) for i in range(len(found)) for j in range(i)]
        mean = {
            (i, j): np.mean([np.linalg.norm(points[a] - points[b]) for a in found[i] for b in found[j]])
            for i, j in pairs
        }
        i, j = min(pairs, key=lambda pair: mean[pair])
        found[j] += found.pop(i)
    return [sorted(group) for group in found]


@pytest.mark.parametrize("how", ["drop", "merge"])
def test_clusters_are_those_of_average_linkage(how: str, tmp_path: Path, text: str) -> None:
    model = mixture("qwen3_moe", seed=2)
    folder = save(model, tmp_path / "all")
    done = prune(folder, tmp_path / "few", settings(text, by="similarity", how=how, keep=3))
    for number, (counts, _, points) in brute_force(model, calibration_ids(folder, text)).items():
        groups = linked(points, 3)
        leaders = [max(group, key=lambda e: counts[e]) for group in groups]
        if how == "drop":
            assert done.layers[number].groups == sorted([leader] for leader in leaders)
        else:
            assert sorted(sorted(group) for group in done.layers[number].groups) == sorted(groups)
            assert [group[0] for group in done.layers[number].groups] == sorted(leaders)


@pytest.mark.parametrize("family", ["mixtral", "moesaic"])
def test_the_others_join_the_nearest_one(family: str, tmp_path: Path, text: str) -> None:
    model = mixture(family, seed=3)
    folder = save(model, tmp_path / "all")
    done = prune(folder, tmp_path / "few", settings(text, by="usage", how="merge", keep=2))
    for number, (counts, _, points) in brute_force(model, calibration_ids(folder, text)).items():
        leaders = sorted(np.argsort(-counts, kind="stable")[:2].tolist())
        groups = {leader: [leader] for leader in leaders}
        for e in set(range(6)) - set(leaders):
            groups[min(leaders, key=lambda other: np.linalg.norm(points[e] - points[other]))].append(e)
        assert [[g[0], *sorted(g[1:])] for g in done.layers[number].groups] == [groups[e] for e in leaders]


def pairs(model: PreTrainedModel, reorder: bool) -> None:
    """Experts 3 to 5 become copies of 0 to 2, with their neurons in another order where ``reorder``."""
    for _, block in blocks_of(model):
        ours = model.config.model_type == "moesaic"
        names = ("up", "down") if ours else ("gate_up_proj", "down_proj")
        up, down = (getattr(block.experts, name).data for name in names)  # type: ignore[union-attr]
        width = down.shape[2]
        for e in range(3):
            order = torch.randperm(width) if reorder else torch.arange(width)
            up[e + 3] = up[e].view(2, width, -1)[:, order].flatten(0, 1)
            down[e + 3] = down[e][:, order]


@pytest.mark.parametrize("similarity", ["outputs", "weights"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "moesaic"])
def test_copies_are_merged_into_themselves(family: str, similarity: str, tmp_path: Path, text: str) -> None:
    model = mixture(family, seed=4)
    pairs(model, reorder=similarity == "outputs")
    folder = save(model, tmp_path / "all")
    wanted = settings(text, by="similarity", how="merge", keep=3, similarity=similarity)
    done = prune(folder, tmp_path / "few", wanted)
    assert done.aligned
    pruned, _ = load_model(tmp_path / "few", device="cpu")
    few = dict(blocks_of(pruned))
    for number, layer in done.layers.items():
        assert sorted(sorted(group) for group in layer.groups) == [[0, 3], [1, 4], [2, 5]]
        x = torch.randn(5, 32, dtype=torch.float64)
        for new, group in enumerate(layer.groups):
            before = one_expert(model, dict(blocks_of(model))[number], group[0], x)
            assert torch.allclose(one_expert(pruned, few[number], new, x), before, atol=1e-5)


def test_a_merged_expert_is_the_weighted_mean(tmp_path: Path) -> None:
    """Experts that are near copies keep their order of neurons: then the mean is that of the numbers."""
    model = mixture("mixtral", seed=5)
    pairs(model, reorder=False)
    with torch.no_grad():
        for _, block in blocks_of(model):
            block.experts.down_proj += 0.01 * torch.randn_like(block.experts.down_proj)  # type: ignore[union-attr]
    folder = save(model, tmp_path / "all")
    counts = {0: [10, 20, 30, 40, 50, 60], 1: [0, 30, 0, 0, 90, 0]}
    trace = trace_of(folder, counts).save(tmp_path / "t.npz")
    wanted = PruneSettings(keep=3, how="merge", by="similarity", similarity="weights", trace=str(trace))
    done = prune(folder, tmp_path / "few", wanted)
    pruned, _ = load_model(tmp_path / "few", device="cpu")
    old, new = dict(blocks_of(model)), dict(blocks_of(pruned))
    for number, layer in done.layers.items():
        for expert, group in enumerate(layer.groups):
            total = sum(counts[number][e] for e in group)
            shares = [counts[number][e] / total if total else 1 / len(group) for e in group]
            for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
                before, after = old[number].get_parameter(part), new[number].get_parameter(part)
                mean = sum(share * before[e].double() for share, e in zip(shares, group, strict=True))
                if part == "gate.weight":
                    length = sum(share * before[e].double().norm() for share, e in zip(shares, group, strict=True))
                    mean = mean * length / torch.as_tensor(mean).norm()
                assert torch.allclose(after[expert].double(), torch.as_tensor(mean), atol=1e-6)


def test_memory_is_a_layer_and_a_shard(tmp_path: Path, text: str) -> None:
    folder = mixture_folder(tmp_path / "all", "qwen2_moe", num_hidden_layers=5, moe_intermediate_size=64)
    source = open_source(folder)
    prefixes = {name.split(".")[2]: 0 for name in source.names if ".layers." in name}
    for name in source.names:
        if ".layers." in name:
            prefixes[name.split(".")[2]] += 4 * torch.Size(source.shape(name)).numel()
    shard = 20_000
    for how in ("drop", "merge"):
        with metered() as meter:
            prune(folder, tmp_path / how, settings(text, how=how, by="similarity"), shard_bytes=shard)
        assert meter.peak < 1.3 * max(prefixes.values()) + shard
        assert len(list((tmp_path / how).glob("*.safetensors"))) > 3


def test_an_interrupted_start_goes_on(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixture_folder(tmp_path / "all", "olmoe")
    wanted = settings(text, how="merge", by="similarity")
    prune(folder, tmp_path / "whole", wanted, shard_bytes=20_000)

    class Stop(Exception):
        pass

    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if "(4 of" in line:
            raise Stop

    with pytest.raises(Stop):
        prune(folder, tmp_path / "few", wanted, shard_bytes=20_000, say=stop)
    assert not (tmp_path / "few").exists()
    with pytest.raises(CheckpointError, match="unfinished conversion with other settings"):
        prune(folder, tmp_path / "few", settings(text, how="merge", by="usage"))
    words = Path(text).read_text()
    Path(text).write_text(words[::-1])
    with pytest.raises(CheckpointError, match=r"with other settings \(text: 'v1:"):
        prune(folder, tmp_path / "few", wanted)
    Path(text).write_text(words)
    other = mixture_folder(tmp_path / "other", "olmoe", seed=7)
    with pytest.raises(CheckpointError, match=r"with other settings \(model: 'v1:"):
        prune(other, tmp_path / "few", wanted)
    monkeypatch.setattr("moesaic.convert.pruning.measure_use", None)  # what was measured is not measured again
    done = prune(folder, tmp_path / "few", wanted, shard_bytes=20_000)
    assert done.written.resumed == 3
    whole, again = (load_model(tmp_path / name, device="cpu")[0].state_dict() for name in ("whole", "few"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not (tmp_path / "few" / "work").exists()


def wrong(text: str) -> list[tuple[dict[str, Any], str]]:
    return [
        ({"keep": None}, "give one of keep .* and share"),
        ({"share": 0.5}, "give one of keep .* and share"),
        ({"keep": 0}, "keep is 0: it must be a whole number, at least 1"),
        ({"keep": None, "share": 1.0}, "share is 1.0: it must be between 0 and 1"),
        ({"how": "mrege"}, "unknown how 'mrege': did you mean 'merge'"),
        ({"by": "luck"}, "unknown by 'luck': .*allowed: reap, similarity, usage"),
        ({"similarity": "looks"}, "unknown similarity 'looks': .*allowed: outputs, weights"),
        ({"tokens": 0}, "tokens is 0: it must be a whole number, at least 1"),
        ({"trace": "t.npz"}, "give data to measure on, or a trace .*, not both"),
        ({"trace": "t.npz", "data": ()}, "a trace does not know the experts' outputs, which by 'reap' looks at"),
        ({"trace": "t.npz", "data": (), "by": "similarity"}, "which similarity 'outputs' looks at"),
    ]


@pytest.mark.parametrize("index", range(11))
def test_settings_that_are_refused(index: int, text: str) -> None:
    changes, message = wrong(text)[index]
    with pytest.raises(ConfigError, match=message):
        settings(text, **changes)


def refused(kind: type[MoesaicError], message: str, folder: Path, wanted: PruneSettings) -> None:
    out = folder.parent / "out"
    with pytest.raises(kind, match=message):
        prune(folder, out, wanted)
    assert not out.exists() and not partial_path(out).exists()


def test_models_that_are_refused(tmp_path: Path, text: str) -> None:
    refused(UnsupportedError, "is dense .llama.: prune takes a mixture", dense_folder(tmp_path / "d"), settings(text))
    folder = mixture_folder(tmp_path / "m", "mixtral")
    refused(ConfigError, "keep is 1 of 6 experts in a layer, of which a token takes 2", folder, settings(text, keep=1))
    refused(ConfigError, "keep is 6 of 6 experts .*: allowed are 2 to 5", folder, settings(text, keep=6))
    refused(ConfigError, "with share 0.9, 1 would stay", folder, settings(text, keep=None, share=0.9))
    refused(ConfigError, "reads at most 128 tokens at once", folder, settings(text, sequence_length=129))
    refused(DataError, "at least 48 tokens are needed", folder, settings(text, tokens=32))
    refused(DataError, "does not exist", folder, settings("nowhere.txt"))
    other = trace_of(folder, {0: [1] * 6, 1: [1] * 5}).save(tmp_path / "t.npz")
    by_trace = PruneSettings(keep=4, by="usage", trace=str(other))
    refused(CheckpointError, "the trace is of another model .* layer 1 has 5 experts", folder, by_trace)
    fused = mixture_folder(tmp_path / "g", "gpt_oss")
    refused(UnsupportedError, "merged can be those of Mixtral", fused, settings(text, how="merge"))
    unequal = mixture_folder(tmp_path / "u", "moesaic", expert_d_ffs=[8, 8, 8, 16, 16, 16])
    refused(UnsupportedError, "of one width", unequal, settings(text))
    stack = mixture_folder(tmp_path / "s", "moesaic", pre_gating="stack")
    refused(UnsupportedError, "has pre_gating 'stack': only layers that each have a router", stack, settings(text))
    zero = mixture_folder(tmp_path / "z", "moesaic", zero_computation_experts={"zero": 1})
    refused(UnsupportedError, "has zero_computation_experts .*: only layers", zero, settings(text))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        prune(folder, tmp_path / "out", settings(text))


def test_groups_of_experts_are_refused(tmp_path: Path, text: str) -> None:
    options = {"num_groups": 3, "top_groups": 1}
    folder = mixture_folder(tmp_path / "m", "moesaic", router="sigmoid_topk", router_options=options)
    assert moe_blocks(folder)[0].groups == 3
    refused(UnsupportedError, "choose among 3 groups of experts first", folder, settings(text))


@pytest.mark.parametrize("how", ["drop", "merge"])
def test_as_many_experts_as_the_model_is_wide(tmp_path: Path, text: str, how: str) -> None:
    """Both axes of the router's matrix have one size: the experts' is cut, not the other one."""
    folder = mixture_folder(tmp_path / "moe", "qwen2_moe", num_experts=32)
    done = prune(folder, tmp_path / "out", settings(text, keep=30, how=how))
    old, new = open_source(folder), open_source(tmp_path / "out")
    gate = "model.layers.0.mlp.gate.weight"
    assert (old.shape(gate), new.shape(gate)) == ((32, 32), (30, 32)) and done.after == 30
    assert load_model(tmp_path / "out")[0].config.num_experts == 30
