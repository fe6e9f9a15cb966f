"""The next token of each sequence: penalties, filters, and a draw that depends on the sequence alone.

A row's token is a function of its logits, its parameters, its seed and how many tokens it has: rows are computed one by
one, with random numbers from a counter (Philox: "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3) instead of
a generator that rows would share. Order and meaning of the steps are those of transformers' logits processors.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.serve.constraints import Constraint, constraint_of, constraints_in
from moesaic.serve.request import FinishReason, SamplingParams
from moesaic.serve.vocabulary import Vocabulary

Row = npt.NDArray[np.float32]

_SMALLEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this number instead
_SMALLEST_TEMPERATURE = 1e-30  # in float32, all below it does the same
_BLOCK = 256  # probabilities that are added in float32 before float64 takes over


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Refuse settings out of range, or that do not go together.

    Args:
        vocab_size: columns of the logits.

    Raises:
        ConfigError: one line that names the setting, its value and what is allowed.
    """
    finite = math.isfinite
    checks = [
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("temperature", finite(params.temperature) and params.temperature >= 0, "at least 0 (0 is greedy)"),
        ("top_k", params.top_k >= 0, "at least 0 (0 is no limit)"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= params.min_p <= 1, "at least 0 and at most 1"),
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "from 0.01 to 100 (1 is none)"),
        ("presence_penalty", finite(params.presence_penalty), "a finite number"),
        ("frequency_penalty", finite(params.frequency_penalty), "a finite number"),
        ("logit_bias", all(map(finite, params.logit_bias.values())), "finite numbers"),
        ("stop", all(params.stop), "strings that are not empty"),
        ("min_tokens", params.min_tokens >= 0, "at least 0"),
        ("logprobs", params.logprobs is None or params.logprobs >= 0, "at least 0"),
        ("n", params.n >= 1, "at least 1"),
    ]
    for name in ("logit_bias", "stop_token_ids"):
        ids = getattr(params, name)
        checks.append((name, all(0 <= token < vocab_size for token in ids), f"token ids from 0 to {vocab_size - 1}"))
    for name, good, allowed in checks:
        if not good:
            raise ConfigError(f"{name} is {_shown(getattr(params, name))}: it must be {allowed}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ConfigError(f"min_tokens is {params.min_tokens}, above max_tokens, which is {params.max_tokens}")
    constraints = constraints_in(params)
    if len(constraints) > 1:
        raise ConfigError(f"{' and '.join(constraints)} exclude each other: a text matches one of them")
    if constraints and (params.min_tokens or params.ignore_eos):
        other = "min_tokens" if params.min_tokens else "ignore_eos"
        raise ConfigError(f"{other} does not go with {next(iter(constraints))}, which decides where the text may end")


@dataclass(eq=False)
class SamplingState:
    """What choosing a sequence's next token needs beside its logits; one for each continuation.

    Attributes:
        output_ids: grows as tokens are chosen: the engine appends.
        constraint: what the text has to match; None: nothing.
        seed: of this continuation. index: which of the request's n continuations it is.
        ends: tokens that may not come before ``params.min_tokens``.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: list[int]
    constraint: Constraint | None
    seed: int
    index: int
    ends: tuple[int, ...] = ()
    _counts: Counter[int] = field(default_factory=Counter)
    _counted: int = 0
    _prompt_set: npt.NDArray[np.int64] | None = None

    def accept(self, token: int) -> FinishReason | None:
        """Take in the chosen token; a reason where the text has to end with it because of its constraint."""
        return None if self.constraint is None else self.constraint.accept(token)

    def counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The different tokens of the output, and how often each occurs."""
        if self._counted > len(self.output_ids):  # computed anew, from fewer tokens
            self._counts.clear()
            self._counted = 0
        self._counts.update(self.output_ids[self._counted :])
        self._counted = len(self.output_ids)
        size = len(self._counts)
        return (
            np.fromiter(self._counts.keys(), np.int64, size),
            np.fromiter(self._counts.values(), np.float32, size),
        )

    def seen(self) -> npt.NDArray[np.int64]:
        """The different tokens of prompt and output."""
        if self._prompt_set is None:
            self._prompt_set = np.unique(np.asarray(self.prompt_ids, dtype=np.int64))
        return np.union1d(self._prompt_set, self.counts()[0])


def make_state(params: SamplingParams, prompt_ids: Sequence[int], vocabulary: Vocabulary, index: int) -> SamplingState:
    """The state of the ``index``-th continuation of a prompt, whose seed is ``params.seed + index``.

    Raises:
        ConfigError: for a schema, expression or grammar that is wrong, not supported or cannot be met.
        MissingDependencyError: for one of these without llguidance.
    """
    seed = secrets.randbits(63) if params.seed is None else params.seed + index
    ends = (*(() if params.ignore_eos else vocabulary.end_ids), *params.stop_token_ids)
    return SamplingState(params, prompt_ids, [], constraint_of(params, vocabulary), seed, index, ends)


@dataclass(frozen=True)
class Sampled:
    """A chosen token.

    Attributes:
        logprob: by the model's own distribution, before penalties, temperature and filters; 0 where not asked for.
        top: the most probable tokens by the same, best first, as many as asked for.
    """

    token: int
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)


class Sampler:
    """Chooses the next token of each sequence of a batch."""

    def sample(self, logits_SV: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """One token per row.

        Args:
            logits_SV: float32, any device; unchanged afterwards. A NaN counts as minus infinity.
        """
        plain = [_is_plain(state) for state in states]
        best = _best(logits_SV, plain)
        rows = [i for i, state in enumerate(states) if not plain[i] or state.params.logprobs is not None]
        own = dict(zip(rows, logits_SV[rows].cpu().numpy(), strict=True)) if rows else {}
        chosen = []
        for i, state in enumerate(states):
            row = _without_nan(own[i]) if i in own else None
            token = best[i] if row is None or plain[i] else _choose(row, state)
            if row is None or state.params.logprobs is None:
                chosen.append(Sampled(token))
            else:
                chosen.append(_with_logprobs(token, row, state.params.logprobs))
        return chosen


def _best(logits_SV: Tensor, wanted: Sequence[bool]) -> dict[int, int]:
    """Row to its most probable token, for the rows that are wanted."""
    rows = [i for i, is_wanted in enumerate(wanted) if is_wanted]
    if not rows:
        return {}
    logits_RV = logits_SV if len(rows) == len(wanted) else logits_SV[rows]
    ids_R = logits_RV.argmax(dim=-1)
    if logits_RV.gather(1, ids_R[:, None]).isnan().any():
        ids_R = logits_RV.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argmax(dim=-1)
    return dict(zip(rows, ids_R.tolist(), strict=True))


def _is_plain(state: SamplingState) -> bool:
    """Whether the most probable token is the answer."""
    params = state.params
    return (
        params.temperature == 0
        and state.constraint is None
        and not params.logit_bias
        and params.repetition_penalty == 1
        and params.presence_penalty == params.frequency_penalty == 0
        and len(state.output_ids) >= params.min_tokens
    )


def _choose(logits: Row, state: SamplingState) -> int:
    params = state.params
    logits = _adjusted(logits, state)
    if params.temperature == 0:
        return int(logits.argmax())
    kept = _filtered(logits, params)
    if kept is None:
        return _draw(_weights(logits, params.temperature), state)
    return int(kept[_draw(_weights(logits[kept], params.temperature), state)])


def _adjusted(logits: Row, state: SamplingState) -> Row:
    """Bias, penalties and what is forbidden here, in the order of transformers; a new row."""
    params, logits = state.params, logits.copy()
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        logits[ids] += np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
    if params.repetition_penalty != 1:
        seen, penalty = state.seen(), np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, times = state.counts()
        logits[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times
    if len(state.output_ids) < params.min_tokens:
        logits[list(state.ends)] = -np.inf
    if state.constraint is not None:
        logits[~state.constraint.mask()] = -np.inf
    return logits


def _filtered(logits: Row, params: SamplingParams) -> npt.NDArray[np.int64] | None:
    """Ascending ids that top-k, top-p and min-p leave, each applied to what the one before left; None: all."""
    kept = None
    if 0 < params.top_k < len(logits):
        least = np.partition(logits, len(logits) - params.top_k)[len(logits) - params.top_k]
        kept = np.flatnonzero(logits >= least)
    if params.top_p < 1:
        kept = _top_p(logits, np.arange(len(logits)) if kept is None else kept, params)
    if params.min_p > 0:
        kept = np.arange(len(logits)) if kept is None else kept
        kept = kept[_weights(logits[kept], params.temperature) >= np.float32(params.min_p)]
    return kept


def _top_p(logits: Row, ids: npt.NDArray[np.int64], params: SamplingParams) -> npt.NDArray[np.int64]:
    """The fewest of ``ids`` that have ``top_p`` of their probability together; of equal ones, the first."""
    weights = _weights(logits[ids], params.temperature)
    # Sorting values takes a fifth of the time of sorting their places.
    descending = np.sort(weights)[::-1]
    reached = np.cumsum(descending.astype(np.float64))
    count = min(int(np.searchsorted(reached, params.top_p * reached[-1])) + 1, len(ids))
    least = descending[count - 1]
    above = weights > least
    ties = np.flatnonzero(weights == least)[: count - int(above.sum())]
    above[ties] = True
    kept: npt.NDArray[np.int64] = ids[above]
    return kept


def _weights(logits: Row, temperature: float) -> Row:
    """Probabilities in proportion to the largest, which is 1."""
    largest = logits.max()
    if not np.isfinite(largest):
        alone: Row = (np.arange(len(logits)) == logits.argmax()).astype(np.float32)
        return alone
    # The differences first: a tiny temperature then leaves 0 and large negative numbers, instead of infinities.
    shifted: Row = logits - largest
    if temperature != 1:
        shifted /= np.float32(max(temperature, _SMALLEST_TEMPERATURE))
    np.exp(shifted, out=shifted)
    return shifted


def _draw(weights: Row, state: SamplingState) -> int:
    """An index with probability ``weights / weights.sum()``, by the sequence's own random number at this position."""
    size = len(weights)
    blocks = np.add.reduceat(weights, np.arange(0, size, _BLOCK), dtype=np.float64)
    ends = np.cumsum(blocks)
    target = _uniform(state.seed, len(state.output_ids)) * ends[-1]
    block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    begin = block * _BLOCK
    inner = np.cumsum(weights[begin : begin + _BLOCK], dtype=np.float64)
    target -= ends[block - 1] if block else 0.0
    place = int(np.searchsorted(inner, target, side="right"))
    # Rounding may lead past the last token of the block: then it is the last one that has any probability.
    return begin + (place if place < len(inner) else int(np.flatnonzero(weights[begin : begin + _BLOCK])[-1]))


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), with 53 random bits."""
    generator = np.random.Philox(key=seed % 2**128, counter=position)
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


def _with_logprobs(token: int, logits: Row, count: int) -> Sampled:
    total = _log_of_sum(logits)
    count = min(count, len(logits))
    top: list[tuple[int, float]] = []
    if count:
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        ids = np.flatnonzero(logits >= least)
        ids = ids[np.lexsort((ids, -logits[ids]))][:count]
        top = [(int(one), _logprob(logits[one], total)) for one in ids]
    return Sampled(token, _logprob(logits[token], total), top)


def _log_of_sum(logits: Row) -> float:
    largest = float(logits.max())
    if not math.isfinite(largest):
        return largest
    return largest + math.log(float(np.exp(logits.astype(np.float64) - largest).sum()))


def _logprob(logit: np.float32, total: float) -> float:
    value = float(logit) - total
    return value if value > _SMALLEST_LOGPROB else _SMALLEST_LOGPROB  # so for NaN, too


def _without_nan(logits: Row) -> Row:
    # The largest is NaN where any is: one pass, which a healthy row ends with.
    return logits if not np.isnan(logits.max()) else np.where(np.isnan(logits), np.float32(-np.inf), logits)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
