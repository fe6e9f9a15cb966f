"""The page: a table, a picture, and for each recipe a sentence that its figures must bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev

import numpy as np

from moesaic.bench.report import markdown
from moesaic.bench.study.entries import CLAIMS, Entry
from moesaic.bench.study.figures import Comparison, Figures, Noise, judge, together
from moesaic.bench.study.speed import ratio

BEGIN, END = "<!-- results: made by benchmarks/routing.py -->\n", "<!-- end of results -->\n"
HEADER = (
    *("recipe", "loss, code", "loss, prose", "at equal compute (± margin)", "active, M", "experts", "free"),
    *("training, tokens/s", "forward, tokens/s", "imbalance", "domain", "shows?"),
)
_NOT_SAID = "*No sentence has been written on these figures.*"
_NOT_COMPARED = "*What it is compared with has not been trained with the same seeds.*"


@dataclass(frozen=True)
class Study:
    """Entries and their figures, by name, in the order of the page; entries without a run are left out.

    ``machine`` says in words on what the speeds were measured.
    """

    entries: Mapping[str, Entry]
    rows: Mapping[str, Figures]
    machine: str = ""

    def comparison(self, name: str) -> Comparison | None:
        """The recipe beside the one that it is compared with; None where either has no figures, or other seeds."""
        compared = self._compared.get(name)
        return compared and replace(compared, noise=self._noise[0], equal_noise=self._noise[1])

    @cached_property
    def _compared(self) -> dict[str, Comparison]:
        pairs = {name: entry.against for name, entry in self.entries.items() if {name, entry.against} <= set(self.rows)}
        return {
            name: Comparison(self.rows[name], self.rows[against], self.rows)
            for name, against in pairs.items()
            if len(self.rows[name].loss) == len(self.rows[against].loss)
            and self.rows[name].seeds == self.rows[against].seeds
        }

    @cached_property
    def _noise(self) -> tuple[Noise, Noise]:
        """Of the losses of all recipes that are compared with another one: as they are, and at equal compute."""
        all_ = self._compared.values()
        equal = [each.losses_at_equal_compute for each in all_ if each.at_equal_compute]
        return Noise.of([each.losses for each in all_]), Noise.of(equal)

    def verdicts(self, name: str) -> dict[str, str]:
        """Claim to verdict; none for what claims nothing."""
        comparison = self.comparison(name)
        return judge(self.entries[name], comparison) if comparison else {}


def contradictions(study: Study) -> list[str]:
    """Sentences that are missing, or say something else than the figures; one line each."""
    found = []
    for name in study.rows:
        entry, verdicts = study.entries[name], study.verdicts(name)
        if not entry.sentence:
            found.append(f"{name}: no sentence has been written; the figures say {_claims(verdicts)}")
        elif verdicts and entry.verdict != together(verdicts):
            said = f"the sentence says {entry.verdict!r}"
            found.append(f"{name}: {said}, the figures {together(verdicts)!r} ({_claims(verdicts)})")
    return found


def section(study: Study, picture: str) -> str:
    """The measured part of the page in Markdown, picture and all."""
    table = markdown(HEADER, [_line(study, name) for name in study.rows])
    said = "\n".join(_said(study, name) for name in study.rows)
    speeds = f"\nSpeeds: {study.machine}.\n" if study.machine else ""
    return f"\n{table}{speeds}\n![Loss against compute, and differences]({picture})\n\n{said}\n"


def replaced(text: str, made: str) -> str:
    """The page with its measured part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{made}{END}{rest.split(END)[1]}"


def fields(study: Study, name: str) -> dict[str, str]:
    """What a sentence may name in braces.

    loss, code, prose (one for each domain), experts, zero, active (M), imbalance, specialization: means over the seeds.
    difference (of the losses, to what it is compared with), at_equal_compute: means ± margins. saved: share of the
    active parameters. training, forward: ratios of the speeds. Each of the means has one with ``their_`` before it.
    """
    found = _means(study.rows[name])
    comparison = study.comparison(name)
    if comparison is None:
        return found
    found |= {f"their_{key}": value for key, value in _means(comparison.theirs).items()}
    found["difference"] = str(comparison.loss)
    found["at_equal_compute"] = str(comparison.at_equal_compute or "?")
    found["saved"] = f"{1 - comparison.active:.0%}".replace("-", "−")
    for kind in ("training", "forward"):
        ours, theirs = getattr(comparison.ours, kind), getattr(comparison.theirs, kind)
        found[kind] = f"{ratio(ours, theirs)[0]:.2f}" if ours and theirs else "?"
    return found


def _means(row: Figures) -> dict[str, str]:
    return {
        **{name: f"{fmean(values):.3f}" for name, values in row.domains.items()},
        "loss": f"{fmean(row.loss):.3f}",
        "experts": f"{fmean(row.experts):.2f}",
        "zero": f"{fmean(row.zero):.2f}",
        "active": f"{fmean(row.active) / 1e6:.2f}",
        "imbalance": f"{fmean(row.imbalance):.2f}",
        "specialization": f"{fmean(row.specialization):.3f}",
    }


def _line(study: Study, name: str) -> tuple[str, ...]:
    row, entry, comparison = study.rows[name], study.entries[name], study.comparison(name)
    verdicts = study.verdicts(name)
    return (
        f"[{entry.title}](#{name})",
        *(spread(values) for values in row.domains.values()),
        str((comparison and comparison.at_equal_compute) or ""),
        f"{fmean(row.active) / 1e6:.2f}",
        spread(row.experts, 2),
        spread(row.zero, 2) if any(row.zero) else "",
        *(_rate(rates) for rates in (row.training, row.forward)),
        spread(row.imbalance, 2),
        spread(row.specialization),
        together(verdicts) if verdicts else "",
    )


def _rate(rates: Sequence[float]) -> str:
    """The median, and the quartiles beside it."""
    if not rates:
        return ""
    low, middle, high = np.percentile(rates, [25, 50, 75])
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation; the mean alone where that is 0 or unknown."""
    deviation = f"{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}" + (f" ± {deviation}" if deviation.strip("0.") else "")


def _said(study: Study, name: str) -> str:
    entry, verdicts = study.entries[name], study.verdicts(name)
    alone = bool(entry.against) and study.comparison(name) is None
    fits = entry.sentence and not alone and (not verdicts or entry.verdict == together(verdicts))
    told = entry.sentence.format(**fields(study, name)) if fits else _NOT_COMPARED if alone else _NOT_SAID
    claim = f" Claimed: {' and '.join(CLAIMS[claim] for claim in entry.claims)}." if entry.claims else ""
    beside = f" Beside `{entry.against}`, {entry.held}." if entry.claims else ""
    paper = f"*{entry.paper}*. " if entry.paper else ""
    result = f" **{_claims(verdicts)}.**" if verdicts else ""
    return f"### `{name}` {{ #{name} }}\n\n{entry.title}. {paper}{claim.strip()}{beside}{result}\n\n{told}\n"


def _claims(verdicts: Mapping[str, str]) -> str:
    words = {"yes": "shows", "no": "does not show", "unclear": "is within the noise"}
    return "; ".join(f"{claim} {words[verdict]}" for claim, verdict in verdicts.items()) or "nothing"
