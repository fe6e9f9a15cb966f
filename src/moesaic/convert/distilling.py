"""A mixture that was made of a dense model gets its quality back: it learns from the dense model on plain text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.lessons import Lessons, Told
from moesaic.convert.mixture import ExcessLossMixture
from moesaic.convert.refitting import Refit, refit, tokens_needed
from moesaic.convert.source import EMBEDDING, TensorSource, load_tokenizer, open_source, passage_length
from moesaic.convert.targets import TARGETS, Target
from moesaic.convert.teacher import load_dense
from moesaic.convert.writing import Output, Written, check_output, partial_folder, write_model
from moesaic.data import TokenData, prepare
from moesaic.data.batches import count_windows
from moesaic.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError, did_you_mean
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.load import load_model
from moesaic.hf.save import check_new
from moesaic.routing.options import is_of
from moesaic.train.precision import PRECISIONS, autocast, choose_precision
from moesaic.train.signals import StopRequest

TRAINED = ("all", "ffn")
MIXTURES = ("excess", "even", "tokens")
SAVE_SECONDS = 300.0
"""Between two saves."""
_ROWS = 4096
Say = Callable[[str], None]


@dataclass(frozen=True)
class DistillSettings:
    """How to distil.

    Args:
        loss: a name of ``moesaic.convert.targets.TARGETS``: kl, reverse_kl or taid; ``loss_options`` are its keywords.
        minutes, tokens: the budget, exactly one of them: minutes of this machine's time with the warm start and without
            the loading and writing, or tokens of text.
        labels: part of the text's own next token in the loss, 0 to 1; the rest is the teacher's.
        train: ``"all"`` but embedding and head, or ``"ffn"``: experts, routers and norms.
        data: text, as :func:`moesaic.data.load_corpus` takes it.
        mixture: shares of the domains: ``"excess"`` begins even and moves to where the student is furthest behind,
            ``"even"`` stays so, ``"tokens"`` takes them as they come.
        held_out: share of its files that is left out, those by which ``moesaic eval`` judges a model.
        sequence_length: tokens of a passage; by default 512, or as many as the models read at once where that is less.
        batch_size: passages a step.
        learning_rate: the highest; it falls linearly to 0.
        warm_start: tokens on which the experts' down projections are first fitted to the dense model's layers; 0 for
            none. More where the layers need more; none where the text has not as many.
        precision: auto, fp32 or bf16, of the products; weights stay float32 while they are trained.
        seed: of the order of the passages.
    """

    loss: str = "kl"
    loss_options: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = None
    tokens: int | None = None
    labels: float = 0.3
    train: str = "all"
    data: tuple[str, ...] = ("stdlib",)
    mixture: str = "excess"
    held_out: float = 0.05
    sequence_length: int | None = None
    batch_size: int = 2
    learning_rate: float = 4e-4
    warm_start: int = 12288
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.tokens is None):
            raise ConfigError("the budget is minutes or tokens: give exactly one of them")
        for name, least in {"tokens": 1, "sequence_length": 2, "batch_size": 1, "warm_start": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and (not is_of(int, value) or value < least):
                raise ConfigError(f"{name} is {value!r}: it must be a whole number from {least} on")
        for name in ("minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and (not is_of(float, value) or value <= 0):
                raise ConfigError(f"{name} is {value!r}: it must be above 0")
        if not is_of(float, self.labels) or not 0 <= self.labels <= 1:
            raise ConfigError(f"labels is {self.labels!r}: it must be from 0 to 1")
        if not is_of(float, self.held_out) or not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out!r}: it must be between 0 and 1, both excluded")
        allowed = {"train": TRAINED, "mixture": MIXTURES, "precision": ("auto", *PRECISIONS)}
        for name, names in allowed.items():
            if getattr(self, name) not in names:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), names)}")
        self.target()

    def target(self) -> Target:
        """What is learned, new. Raises :class:`ConfigError` for an unknown loss or option of it."""
        try:
            return TARGETS.get(self.loss)(**self.loss_options)
        except TypeError as error:
            raise ConfigError(f"the loss {self.loss!r} does not take these options: {error}") from None


@dataclass(frozen=True)
class Distilled:
    """What was done: ``first`` and ``last`` are the mean loss of the first and last tenth of the steps of this start,
    in nats; ``tokens``, ``steps`` and ``seconds`` are of all starts; ``refit`` is what the warm start of this start
    reached by layer; ``shares`` the domains' shares at the end."""

    written: Written
    steps: int
    tokens: int
    seconds: float
    first: float
    last: float
    shares: dict[str, float]
    refit: dict[int, Refit]


def distill(
    student: str | Path,
    teacher: str | Path,
    out: str | Path,
    settings: DistillSettings,
    *,
    say: Say | None = None,
    shard_bytes: int = 2 << 30,
) -> Distilled:
    """Teach the mixture in the folder ``student`` what the dense model ``teacher`` says; write it to ``out``.

    First the experts' down projections are fitted layer by layer (:func:`moesaic.convert.refitting.refit`); then all
    weights but embedding and head learn the teacher's distributions of the next token, within the budget.

    On SIGINT or SIGTERM the step is finished and saved; it is saved every five minutes too, and when learning is over.
    The same call goes on from there. ``<out>.partial`` holds what is saved until ``out`` is written.

    Args:
        student: what :func:`moesaic.convert.split` or :func:`moesaic.convert.upcycle` has written.
        teacher: the dense model that it was made of, a folder or a ``.gguf`` file.
        say: called with a line of text now and then.

    Raises:
        ConfigError: for a ``sequence_length`` beyond what the models read at once.
        CheckpointError: for models that cannot be read or do not go together, and an ``out`` that exists or holds an
            unfinished conversion of other models, other text or other settings.
        DataError: for text that cannot be read, or of which a domain is shorter than a passage.
        UnsupportedError: for a teacher that is no dense model of the supported architectures.
        Interrupted: on a signal, when it has been saved.
        TrainingError: for a loss that is not finite.
    """
    told = say or (lambda line: None)
    source, dense = check_distill(student, teacher, out)
    length = passage_length(settings.sequence_length, source, dense.source)
    text = read_lessons(source, settings, length, told)
    note = _note(source, dense, settings, length, text)
    check_output(Path(out), note)
    with partial_folder(Path(out), note) as partial, StopRequest() as stop:
        work = partial / "work"
        work.mkdir(exist_ok=True)
        lessons, refitted = _begin(source, dense, settings, length, text, work, stop, told)
        losses = _learn(lessons, work, stop, told)
        state = {name: tensor.detach() for name, tensor in lessons.student.state_dict().items()}
        written = write_model(
            [_output(source, name, state) for name in source.names],
            Path(out),
            config=source.config,
            tokenizer_from=source.tokenizer_from,
            settings=note,
            shard_bytes=shard_bytes,
            say=say,
        )
    tenth = max(1, len(losses) // 10)
    return Distilled(
        written,
        lessons.step,
        lessons.tokens,
        lessons.seconds,
        sum(losses[:tenth]) / tenth if losses else float("nan"),
        sum(losses[-tenth:]) / tenth if losses else float("nan"),
        lessons.mixture.shares,
        refitted,
    )


def check_distill(student: str | Path, teacher: str | Path, out: str | Path) -> tuple[TensorSource, DenseModel]:
    """Refuse, before any work, models that do not go together or an ``out`` that exists; raises as :func:`distill`."""
    check_new(out)
    source, dense = open_source(student), check_dense(open_source(teacher))
    ours, theirs = source.config, dense.source.config
    if not isinstance(ours, MoesaicConfig):
        raise CheckpointError(
            f"{str(student)!r} is a {ours.model_type} model: the student must be a mixture of ours, as split and "
            "upcycle write it"
        )
    if getattr(ours, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{str(student)!r} has quantized weights, which cannot be trained: distil the model it was quantized from, "
            "and quantize afterwards"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise CheckpointError(
                f"{str(student)!r} was not made of {str(teacher)!r}: {name} is {getattr(ours, name)} there and "
                f"{getattr(theirs, name)} in the teacher"
            )
    if not _same_embedding(source, dense.source):
        raise CheckpointError(
            f"{str(student)!r} was not made of {str(teacher)!r}: their embeddings differ, and neither splitting nor "
            "distilling changes them; the teacher must be the dense model that the student was made of"
        )
    return source, dense


def _same_embedding(ours: TensorSource, theirs: TensorSource) -> bool:
    """Whether they are equal, or one is the other one rounded."""
    for start in range(0, ours.shape(EMBEDDING)[0], _ROWS):
        one, other = (source.read(EMBEDDING, slice(start, start + _ROWS)) for source in (ours, theirs))
        if not (torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)):
            return False
    return True


def read_lessons(model: TensorSource, settings: DistillSettings, length: int, say: Say) -> TokenData:
    """The text to learn, as tokens of the model.

    Raises:
        DataError: for text that cannot be read or does not fit, or of which a domain is shorter than a passage of
            ``length`` tokens.
        CheckpointError: where the model has no tokenizer.
    """
    say("reading the text")
    where = model.tokenizer_from
    tokenizer = load_tokenizer(where) if where.suffix == ".gguf" else str(where)
    text = prepare(settings.data, tokenizer=tokenizer, validation_fraction=settings.held_out)
    if not text.train:
        raise DataError(f"the text has no documents beside the share of {settings.held_out} that is held out")
    for name, ids in text.train.items():
        count_windows(name, ids, length)
        if (highest := int(ids.max())) >= model.config.vocab_size:
            raise DataError(
                f"the tokenizer does not fit the model: it gave the token id {highest}, but the model's vocabulary has "
                f"{model.config.vocab_size} entries"
            )
    return text


def _note(
    source: TensorSource, dense: DenseModel, settings: DistillSettings, length: int, text: TokenData
) -> dict[str, Any]:
    """All that is learned depends on; also the length of passages that was not given."""
    made = {"method": "distill", "student": source.content(), "teacher": dense.source.content()}
    told = {**made, **asdict(settings), "sequence_length": length, "data": list(settings.data)}
    return {**told, "text": text.fingerprint}


def _output(source: TensorSource, name: str, state: dict[str, Tensor]) -> Output:
    dtype = source.dtype(name)
    return Output(name, source.shape(name), dtype, lambda: state[name].to(dtype).clone().contiguous())


def _begin(
    source: TensorSource,
    dense: DenseModel,
    settings: DistillSettings,
    length: int,
    text: TokenData,
    work: Path,
    stop: StopRequest,
    say: Say,
) -> tuple[Lessons, dict[int, Refit]]:
    """Student and teacher in memory, and what an interrupted start had reached."""
    say("loading student and teacher")
    device = torch.device("cpu")
    precision = choose_precision(settings.precision, device)
    student, _ = load_model(source.path, dtype=torch.float32, device=device)
    teacher = load_dense(dense, torch.bfloat16 if precision == "bf16" else torch.float32)
    counts = {name: float(len(ids)) for name, ids in text.train.items()}
    first = counts if settings.mixture == "tokens" else dict.fromkeys(counts, 1.0)
    mixture = ExcessLossMixture(first, rate=0.1 if settings.mixture == "excess" else 0.0)
    lessons = Lessons(
        student,
        teacher,
        settings.target(),
        mixture,
        text.train,
        sequence_length=length,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        budget_tokens=settings.tokens,
        budget_seconds=None if settings.minutes is None else 60 * settings.minutes,
        labels=settings.labels,
        train=settings.train,
        precision=precision,
    )
    if (saved := work / "state.safetensors").is_file():
        try:
            lessons.load(saved)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to begin anew, remove {str(work.parent)!r}") from error
        say("learning is over: writing" if lessons.finished else f"going on after step {lessons.step}")
        return lessons, {}
    if settings.warm_start == 0:
        return lessons, {}
    return lessons, _warm(lessons, settings.warm_start, length, work, stop, say)


def _warm(lessons: Lessons, given: int, length: int, work: Path, stop: StopRequest, say: Say) -> dict[int, Refit]:
    """Fit the experts to the dense layers, and save; nothing where the text is too short for it."""
    tokens = max(given, needed := tokens_needed(lessons.student))
    if lessons.text_tokens < needed:
        say(f"no warm start: its layers need {needed} tokens, the text has {lessons.text_tokens}")
        return {}
    if tokens > given:
        say(f"the warm start takes {tokens} tokens instead of {given}: its layers need as many")
    passages = -(-tokens // length)
    ids_BT = lessons.passages(lessons.mixture.draw(passages))

    def before(layer: int) -> None:
        if stop.received is not None:
            raise Interrupted(
                "interrupted in the warm start, of which nothing is saved: the same command begins the warm start anew"
            )
        say(f"layer {layer + 1} of {len(lessons.student.model.layers)}: fitting its experts to the dense layer")

    with autocast(ids_BT.device, lessons.precision):
        reached = refit(lessons.student, lessons.teacher, ids_BT[:, :-1].contiguous(), say=before)
    if reached:
        before_, after = (
            sum(getattr(each, name) for each in reached.values()) / len(reached) for name in ("before", "after")
        )
        say(f"error of the layers' output: {before_:.1%} before, {after:.1%} after")
    lessons.save(work / "state.safetensors")
    return reached


def _learn(lessons: Lessons, work: Path, stop: StopRequest, say: Say) -> list[float]:
    """Steps until the budget is spent; the losses. The end is saved before anything is written of what was learned, so
    that all shards of the model are of one training, however often the writing begins."""
    losses: list[float] = []
    saved = said = time.monotonic()
    while lessons.progress < 1:
        if stop.received is not None:
            lessons.save(work / "state.safetensors")
            raise Interrupted(f"interrupted after step {lessons.step}, which is saved: the same command goes on")
        told = _taken(lessons, work)
        losses.append(told.loss)
        now = time.monotonic()
        if now - said > 10 or told.step == 1:
            said = now
            say(
                f"step {told.step}: loss {told.loss:.4f}, {told.excess:+.4f} nats from the teacher, {told.tokens} "
                f"tokens in {told.seconds / 60:.1f} min, {lessons.progress:.0%}"
            )
        if now - saved > SAVE_SECONDS:
            saved = now
            lessons.save(work / "state.safetensors")
    if not lessons.finished:
        lessons.finish()
        lessons.save(work / "state.safetensors")
    return losses


def _taken(lessons: Lessons, work: Path) -> Told:
    try:
        return lessons.take()
    except TrainingError as error:
        raise TrainingError(f"{error}; what is saved is in {str(work.parent)!r}") from error
