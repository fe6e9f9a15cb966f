"""Loading model folders, generation settings and export: what works, and what every damaged folder says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, PreTrainedTokenizerFast

import moesaic
from moesaic.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from moesaic.hf.export import export_folder
from moesaic.hf.generation import Sampling, generate
from moesaic.hf.load import load_model, model_folder

VOCABULARY = 64


def tiny_config(**changes: object) -> moesaic.MoesaicConfig:
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 48,
        "eos_token_id": 0,
    }
    return moesaic.MoesaicConfig(**(settings | changes))


def byte_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0} | {chr(33 + i): i for i in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ours"
    torch.manual_seed(0)
    moesaic.MoesaicForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def test_a_model_and_a_run_folder_load_alike(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run" / "model")
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "model"
    ids = torch.arange(1, 9).unsqueeze(0)
    first, _ = load_model(saved)
    second, _ = load_model(tmp_path / "run")
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert not first.training


def test_a_transformers_moe_and_a_dense_model_load(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads, num_local_experts=4))
    for name, model in (("mixtral", mixtral), ("llama", LlamaForCausalLM(LlamaConfig(**sizes, **heads)))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        loaded, _ = load_model(tmp_path / name, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
    assert load_model(tmp_path / "mixtral")[0].config._experts_implementation == "moesaic"


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no model folder"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "the configuration in .* cannot be loaded"),
        (lambda f: edit_config(f, model_type="nonsense"), "the configuration in .* cannot be loaded"),
        (lambda f: edit_config(f, num_experts_per_tok=9), "top_k is 9"),
        (
            lambda f: edit_config(f, hidden_size=32),
            r"not match their configuration: mismatched keys: lm_head.weight \(saved \[64, 16\], configured \[64, 32\]",
        ),
        (lambda f: edit_config(f, num_hidden_layers=3), "do not match their configuration: missing keys"),
        (
            lambda f: edit_config(f, num_hidden_layers=1),
            "do not match their configuration: unexpected keys: model.layers.1.* and 10 more",
        ),
        (lambda f: cut(f / "model.safetensors", 0.5), "the weights in .* cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "the weights in .* cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "the tokenizer in .* cannot be loaded"),
        (
            lambda f: byte_tokenizer(VOCABULARY + 5).save_pretrained(f),
            "does not fit the model: its highest token id is 68",
        ),
    ],
)
def test_damaged_folders_are_refused_in_one_line(broken: Path, damage: object, message: str) -> None:
    damage(broken)  # type: ignore[operator]
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_code_in_the_folder_is_not_run(broken: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was run"
    (broken / "code.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: pass\n")
    edit_config(broken, model_type="foreign", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"})
    with pytest.raises(CheckpointError, match=r"the configuration in .* cannot be loaded: .*custom code") as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_code_of_a_known_model_is_passed_over(broken: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was run"
    (broken / "code.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: pass\n")
    edit_config(broken, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"})
    assert isinstance(load_model(broken)[0], moesaic.MoesaicForCausalLM)
    assert not trace.exists()


def test_a_quantization_that_is_not_installed(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> object:
        raise ImportError("Using `bitsandbytes`\nrequires Accelerate")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(CheckpointError, match=r"the weights in .*: Using `bitsandbytes` requires Accelerate$"):
        load_model(broken)


def test_keys_that_transformers_ignores_are_no_fault(tmp_path: Path) -> None:
    """Old checkpoints hold rotary frequencies per layer, and the head even where it is tied."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = load_model(tmp_path)
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has not finished"):
        model_folder(tmp_path)


def test_generation_streams_what_it_returns_and_follows_the_seed(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    pieces: list[str] = []
    first = generate(model, tokenizer, "ABC", Sampling(max_new_tokens=12), on_text=pieces.append)
    second = generate(model, tokenizer, "ABC", Sampling(max_new_tokens=12))
    other = generate(model, tokenizer, "ABC", Sampling(max_new_tokens=12, seed=1))
    assert first.text == second.text != other.text
    assert "".join(pieces).replace(" ", "") == first.text.replace(" ", "")
    assert first.prompt_tokens == 3
    assert first.new_tokens == 12 or first.finish_reason == "stop"


def test_greedy_generation_is_the_argmax(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    made = generate(model, tokenizer, "ABC", Sampling(max_new_tokens=4, temperature=0))
    ids = torch.tensor([tokenizer("ABC")["input_ids"]])
    for _ in range(made.new_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert made.text == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)


def test_an_empty_prompt_starts_a_text(saved: Path) -> None:
    assert generate(*load_model(saved), "", Sampling(max_new_tokens=2)).prompt_tokens == 1


def test_a_prompt_beyond_the_context_is_refused(saved: Path) -> None:
    with pytest.raises(DataError, match="at most 48"):
        generate(*load_model(saved), "A" * 40, Sampling(max_new_tokens=9))


def test_by_default_a_text_ends_with_the_context(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    model.generation_config.eos_token_id = None
    made = generate(model, tokenizer, "A" * 40, Sampling())
    assert (made.new_tokens, made.finish_reason) == (8, "length")
    with pytest.raises(DataError, match=r"the prompt has 48 tokens and one new token at least: .* at most 48"):
        generate(model, tokenizer, "A" * 48, Sampling())


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_the_models_own_settings_do_not_take_the_place_of_ours(broken: Path, saved: Path, temperature: float) -> None:
    others = {
        "do_sample": True,
        "num_beams": 2,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "repetition_penalty": 50.0,
        "no_repeat_ngram_size": 1,
        "min_p": 0.99,
        "typical_p": 0.1,
        "epsilon_cutoff": 0.5,
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.1,
        "min_new_tokens": 30,
        "max_new_tokens": 1,
    }
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": 7} | others))
    sampling = Sampling(max_new_tokens=20, temperature=temperature, seed=3)
    model, tokenizer = load_model(broken)
    plain, _ = load_model(saved)
    plain.generation_config.eos_token_id = 7
    wanted = generate(plain, tokenizer, "ABC", sampling)
    pieces: list[str] = []
    made = generate(model, tokenizer, "ABC", sampling, on_text=pieces.append)
    assert (made.text, made.finish_reason) == (wanted.text, wanted.finish_reason)
    assert "".join(pieces).strip()
    assert model.generation_config.num_beams == 2


def test_chat_without_a_template_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        generate(*load_model(saved), "A", Sampling(), chat=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_sampling_settings_out_of_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} is .* it must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_export_writes_a_whole_folder_or_none(saved: Path, tmp_path: Path) -> None:
    folder = export_folder(saved, tmp_path / "qwen")
    ids = torch.arange(1, 9).unsqueeze(0)
    ours, _ = load_model(saved)
    theirs, tokenizer = load_model(folder)
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    assert tokenizer.eos_token == "<eos>"
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="exists already"):
        export_folder(saved, folder)
    with pytest.raises(UnsupportedError, match="only a MoesaicForCausalLM"):
        export_folder(folder, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen"]
