"""A recipe: everything that decides a run, in sections.

The defaults are ordinary ones for a small model; the demo's values are in ``demo.toml`` beside this file. Docs and
error messages are made from the descriptions and ranges below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

Option = bool | int | float | str
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Base: unknown keys, wrong types, infinities and NaN are refused, and nothing changes once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSettings(Section):
    """``[model]``: the architecture."""

    d_model: int = Field(256, ge=1, description="Width of a token; num_heads must divide it.")
    num_layers: int = Field(4, ge=1, description="Decoder layers.")
    num_heads: int = Field(4, ge=1, description="Attention heads.")
    num_kv_heads: int = Field(2, ge=1, description="Heads of keys and values; must divide num_heads.")
    d_ff: int = Field(256, ge=1, description="Hidden width of one expert.")
    num_experts: int = Field(8, ge=1, description="Routed experts per layer.")
    top_k: int = Field(2, ge=1, description="Experts per token, or the most that an adaptive router takes.")
    router: str = Field("softmax_topk", description="A name of moesaic.routing.available().")
    router_options: dict[str, Option] = Field({}, description="That router's own options.")
    balancing: dict[str, float | dict[str, Option]] = Field(
        {"load_balancing": 0.01},
        description="Balancer to coefficient, or to a table of its coefficient, schedule and options.",
    )
    capacity_factor: float = Field(
        0.0, description="0: dropless. Above 0: every expert takes this times its even share. Below 0: at most that."
    )
    activation: str = Field("swiglu", description="A name of moesaic.experts.ACTIVATIONS.")
    expert_bias: bool = Field(False, description="Biases in the experts.")
    num_shared_experts: int = Field(0, ge=0, description="Experts that every token takes.")
    shared_d_ff: int | None = Field(None, ge=1, description="Hidden width of a shared expert; d_ff by default.")
    shared_gate: bool = Field(False, description="Gate the shared experts' sum by the token.")
    zero_computation_experts: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="Kind (zero, copy, constant) to number of experts that cost nothing, beside num_experts."
    )
    capacity_tau: float = Field(
        1.0, gt=0, description="Rows that an expert may take for one of a zero-computation expert's (MoE++)."
    )
    iterations: int = Field(1, ge=1, description="How often a layer routes a token, each time by another router.")
    expert_d_ffs: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Hidden width of each expert, where they differ; in place of d_ff."
    )
    communication_width: int | None = Field(
        None, ge=1, description="Width in which tokens travel to the experts and back; d_model by default."
    )
    pre_gating: Literal["none", "layer", "stack"] = Field(
        "none", description="layer: routers read what enters the block. stack: one router, ahead of all layers."
    )
    dense_layers: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="Layers, counted from 0, with an ordinary feed-forward in place of experts."
    )
    dense_d_ff: int | None = Field(None, ge=1, description="Hidden width of those; top_k · d_ff by default.")
    tie_embeddings: bool = Field(True, description="One matrix for input and output embeddings.")
    max_length: int = Field(1024, ge=1, description="Positions of the model; at least data.sequence_length.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary position embedding.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TextSettings(Section):
    """The part of ``[data]`` that every kind of run has: the text, and how it becomes sequences."""

    sources: Annotated[list[str], BeforeValidator(_listed)] = Field(
        ["stdlib"],
        min_length=1,
        description="'stdlib' (Python's own library: domains code and prose), PATH or DOMAIN=PATH of "
        ".txt, .md, .py, .jsonl, .parquet files and folders.",
    )
    sequence_length: int = Field(256, ge=1, description="Tokens per sequence.")
    validation_fraction: Share = Field(0.05, description="Share of the files held out for validation.")
    mixture: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="Shares of the domains, in any unit; by default in proportion to their tokens."
    )


class DataSettings(TextSettings):
    """``[data]``: the text, and the tokenizer that a new model gets."""

    tokenizer: str | None = Field(None, description="Folder or name of a tokenizer; without it one is trained.")
    vocab_size: int = Field(4096, ge=257, description="Entries of the tokenizer that is trained.")


class TrainSettings(Section):
    """``[train]``: the optimization."""

    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Sequences per optimizer step.")
    accumulation: int = Field(1, ge=1, description="Equal parts in which a batch is worked through; must divide it.")
    exact_balancing: bool = Field(
        False,
        description="With accumulation, count the slots of the whole batch ahead of it, for balancers over the batch.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's learning rate after warm-up.")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="Share of it that the cosine decay ends at.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up, at most steps; by default 6 in 100 of them, at most 1000."
    )
    weight_decay: float = Field(0.1, ge=0, description="On weight matrices; not on norms, biases and embeddings.")
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Strict(False)] = (
        Field((0.9, 0.95), description="Decay of AdamW's two moments.")
    )
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the weights and of the order of the data.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: autocast with weights in fp32. auto: bf16 where the hardware multiplies it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one.")
    threads: int = Field(0, ge=0, description="CPU threads; 0 leaves the number to PyTorch.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    compile: bool = Field(False, description="Run the model through torch.compile.")
    eval_every: int = Field(0, ge=0, description="Steps between validations; 0: before and after training only.")
    eval_tokens: int = Field(0, ge=0, description="Validation tokens per domain, spread over it; 0: all.")
    save_every: int = Field(500, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept.")

    @property
    def warmup(self) -> int:
        """Steps of warm-up, the default worked out."""
        return min(1000, self.steps * 6 // 100) if self.warmup_steps is None else self.warmup_steps


class ParallelSettings(Section):
    """``[parallel]``: how the processes that ``torchrun`` starts work together; nothing where there is one."""

    strategy: Literal["auto", "tokens", "weights", "hybrid"] = Field(
        "auto", description="What travels between ranks, to the experts or from them; auto chooses at every step."
    )
    overlap: int | None = Field(
        None, ge=1, description="Parts in which a layer's exchange and computation overlap; chosen by default."
    )
    exchange: Literal["direct", "hierarchical"] | None = Field(
        None, description="hierarchical: inside a machine first, then between machines; chosen by default."
    )
    timeout: int = Field(300, ge=1, description="Seconds that a rank is waited for before the run ends.")


# Keys that do not change a single number of the run: a resumed run may have others than before.
HARMLESS = frozenset(
    {"name", "train.eval_every", "train.eval_tokens", "train.save_every", "train.keep"}
    | {f"parallel.{key}" for key in ParallelSettings.model_fields}
)
NAME = r"^[\w][\w.-]*$"


class RunRecipe(Section):
    """Base of the recipes of all kinds of runs: single values, and sections, one a field.

    Attributes:
        command: the command that runs it.
        default_file: the recipe that is meant where none is named; without one, that of all defaults.
        harmless: keys that change no number of a run.
    """

    command: ClassVar[str]
    default_file: ClassVar[Path | None] = None
    harmless: ClassVar[frozenset[str]] = HARMLESS

    name: str
    data: TextSettings
    train: TrainSettings

    @classmethod
    def kind(cls, tables: Mapping[str, Any], overrides: Sequence[str]) -> type[Self]:
        """The class of recipe that TOML tables and ``key=value`` words on top of them stand for."""
        return cls

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Name to class of each section, as they stand in a file."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        found = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
        last = {"data": 1, "train": 2, "parallel": 3}
        return {name: found[name] for name in sorted(found, key=lambda name: (last.get(name, 0), name))}

    @classmethod
    def known_keys(cls) -> dict[str, FieldInfo]:
        """Every dotted key of a recipe and its field."""
        sections = cls.sections()
        keys = {name: field for name, field in cls.model_fields.items() if name not in sections}
        for name, section in sections.items():
            keys |= {f"{name}.{key}": field for key, field in section.model_fields.items()}
        return keys

    def flat(self) -> dict[str, Any]:
        """Dotted key to value, as JSON stores it; tables (``model.balancing``) are one value each."""
        tables = self.model_dump(mode="json")
        flat = {name: value for name, value in tables.items() if name not in self.sections()}
        for section in self.sections():
            flat |= {f"{section}.{key}": value for key, value in tables[section].items()}
        return flat

    def differences(self, then: RunRecipe) -> list[str]:
        """What an earlier recipe said otherwise; keys that change no number are left out."""
        before, now = then.flat(), self.flat()
        return [
            f"{key} ({before.get(key)!r} then, {now.get(key)!r} now)"
            for key in now | before
            if before.get(key) != now.get(key) and key not in self.harmless
        ]


class Recipe(RunRecipe):
    """One training run; ``name`` is that of its folder under ``runs/``."""

    command = "train"
    default_file = Path(__file__).with_name("demo.toml")

    name: str = Field("demo", pattern=NAME, description="Name of the run.")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
