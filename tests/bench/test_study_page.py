"""The routing study: what is made of the figures, and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.bench.study.entries import CLAIMS, Entry
from moesaic.bench.study.figures import LINE, Comparison, Difference, Figures, Noise, figures_of, judge, together
from moesaic.bench.study.page import Study, contradictions, replaced, section
from moesaic.bench.study.picture import write_picture
from moesaic.train.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]


def row(loss: Sequence[float], active: float = 2e6, **others: Any) -> Figures:
    """A recipe's figures, the given ones aside all alike."""
    same = {name: [2.0] * len(loss) for name in ("experts", "imbalance", "specialization")}
    values: dict[str, Any] = {
        "domains": {"code": list(loss), "prose": list(loss)},
        "loss": list(loss),
        "zero": [0.0] * len(loss),
        "active": [active] * len(loss),
        **same,
        **others,
    }
    return Figures(**values)


def entry(name: str, claims: Sequence[str] = (), against: str = "", **said: Any) -> Entry:
    return Entry(name, load_recipe(), name, claims=tuple(claims), against=against, held="all", **said)


def test_figures_are_means_over_the_domains() -> None:
    result = {
        "validation": {"code": {"loss": 4.0}, "prose": {"loss": 5.0}},
        "experts": {"code": 1.0, "prose": 2.0},
        "zero": {"code": 0.0, "prose": 1.0},
        "active_parameters": 7,
        "imbalance": 1.5,
        "specialization": 0.25,
        "recipe": {"train.seed": 3},
    }
    found = figures_of([result, result], {"training": [1.0], "forward": [2.0]})
    assert found.seeds == [3, 3]
    assert (found.loss, found.experts, found.zero, found.active) == ([4.5, 4.5], [1.5, 1.5], [0.5, 0.5], [7.0, 7.0])
    assert found.domains == {"code": [4.0, 4.0], "prose": [5.0, 5.0]}
    assert (found.training, found.forward) == ([1.0], [2.0])


def test_a_difference_is_as_sure_as_the_seeds_agree() -> None:
    sure, unsure = Difference.of([-0.10, -0.11, -0.09]), Difference.of([-0.3, 0.2, 0.0])
    assert sure.mean == pytest.approx(-0.1)
    assert sure.margin == pytest.approx(2.92 * 0.01 / math.sqrt(3))  # Student's t, two degrees of freedom
    assert (sure.verdict(), unsure.verdict(), sure.verdict(-0.2)) == ("yes", "unclear", "no")
    assert Difference.of([-5.0]).verdict() == "unclear"  # one seed says nothing
    assert str(sure) == "−0.100 ± 0.017"
    # Three seeds that agree by chance are judged by how much the others of the study differ.
    noise = Noise.of([[0.0, 0.2, -0.2], [0.1, -0.1, 0.0], [1.0]])
    assert noise == Noise(pytest.approx(math.sqrt((0.04 + 0.01) / 2)), 4)
    assert Difference.of([-0.10, -0.11, -0.09], noise).verdict() == "unclear"
    # And one that differs more than the others by its own deviation, which three seeds hardly tell: t is 2.92, not 1.7.
    wild = Difference.of([0.0, 0.2, -0.2], Noise(0.1, 40))
    assert wild.margin == pytest.approx(2.92 * 0.2 / math.sqrt(3))


LINE_ROWS = {
    "softmax_top1": row([5.3, 5.3, 5.3], 1e6),
    "softmax": row([5.0, 5.0, 5.0], 2e6),
    "softmax_top3": row([4.9, 4.9, 4.9], 3e6),
}


@pytest.mark.parametrize(
    ("active", "expected"), [(2e6, 0.0), (1.5e6, -0.15), (2.5e6, 0.05), (0.5e6, -0.45), (3.5e6, 0.15)]
)
def test_equal_compute_is_read_off_the_line_of_the_baseline(active: float, expected: float) -> None:
    """The same loss with less compute is better, with more it is worse."""
    compared = Comparison(row([5.0, 5.0, 5.0], active), LINE_ROWS["softmax"], LINE_ROWS)
    assert compared.at_equal_compute is not None
    assert compared.at_equal_compute.mean == pytest.approx(expected)
    assert compared.loss.mean == 0


def test_equal_compute_needs_a_partner_on_the_line_or_as_much_compute() -> None:
    other = row([5.0, 5.0, 5.0], 2e6)
    same = Comparison(row([5.1, 5.1, 5.1], 2e6), other, LINE_ROWS).at_equal_compute
    assert same is not None and same.mean == pytest.approx(0.1)
    assert Comparison(row([5.1, 5.1, 5.1], 1e6), other, LINE_ROWS).at_equal_compute is None


@pytest.mark.parametrize(
    ("claim", "figures", "verdict"),
    [
        ("quality", row([4.9, 4.91, 4.9]), "yes"),
        ("quality", row([5.1, 5.11, 5.1]), "no"),
        ("quality", row([4.9, 5.1, 5.0]), "unclear"),
        ("quality", row([4.95, 4.95, 4.95], 3e6), "no"),  # lower, but not as low as that much compute buys
        ("parity", row([5.01, 5.012, 5.01]), "yes"),
        ("parity", row([5.05, 5.06, 5.05]), "no"),
        ("compute", row([5.01, 5.012, 5.01], 1.8e6), "yes"),
        ("compute", row([5.01, 5.012, 5.01], 1.99e6), "no"),
        ("compute", row([5.1, 5.1, 5.1], 1.5e6), "no"),
        ("balance", row([5.0] * 3, imbalance=[1.5, 1.6, 1.5]), "yes"),
        ("imbalance", row([5.0] * 3, imbalance=[1.5, 1.6, 1.5]), "no"),
        ("imbalance", row([5.0] * 3, imbalance=[3.0, 3.1, 3.0]), "yes"),
        ("specialization", row([5.0] * 3, specialization=[2.5, 2.6, 2.5]), "yes"),
        ("specialization", row([5.0] * 3, specialization=[1.5, 2.5, 2.0]), "unclear"),
        ("worse", row([5.1, 5.11, 5.1]), "yes"),
        ("throughput", row([5.0] * 3), "unclear"),
        ("throughput", row([5.0] * 3, forward=[1.2, 1.3, 1.2]), "yes"),
        ("throughput", row([5.0] * 3, forward=[0.9, 1.0, 0.9]), "no"),
    ],
)
def test_a_claim_is_judged_by_the_figures(claim: str, figures: Figures, verdict: str) -> None:
    base = row([5.0, 5.0, 5.0], forward=[1.0, 1.0, 1.0])
    compared = Comparison(figures, base, {**LINE_ROWS, "softmax": base})
    assert judge(entry("x", [claim], "softmax"), compared) == {claim: verdict}


def test_every_claim_can_be_judged() -> None:
    compared = Comparison(LINE_ROWS["softmax"], LINE_ROWS["softmax"], LINE_ROWS)
    assert judge(entry("x", list(CLAIMS), "softmax"), compared).keys() == CLAIMS.keys()
    assert together({"a": "yes", "b": "yes"}) == "yes"
    assert together({"a": "yes", "b": "unclear"}) == "unclear"
    assert together({"a": "no", "b": "unclear"}) == "no"


def study_of(**said: Any) -> Study:
    entries = {"softmax": entry("softmax", sentence="What others are read against.")}
    entries["better"] = entry("better", ["quality"], "softmax", **said)
    return Study(entries, {"softmax": row([5.0, 5.1, 5.2]), "better": row([4.8, 4.9, 5.01])})


def test_a_sentence_that_fits_is_told_with_its_figures() -> None:
    study = study_of(verdict="yes", sentence="It is {difference} with {experts} experts, theirs {their_experts}.")
    assert contradictions(study) == []
    made = section(study, "picture.png")
    assert "It is −0.197 ± 0.010 with 2.00 experts, theirs 2.00." in made
    assert "| [better](#better) | 4.903 ± 0.105 | 4.903 ± 0.105 | −0.197 ± 0.010 | 2.00 | 2.00 |  |  |  |" in made
    assert "quality shows" in made
    assert "![Loss against compute, and differences](picture.png)" in made


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"verdict": "no", "sentence": "It does not show."}, "better: the sentence says 'no', the figures 'yes'"),
        ({"verdict": "unclear", "sentence": "Who knows."}, "better: the sentence says 'unclear', the figures 'yes'"),
        ({"sentence": "No verdict with it."}, "better: the sentence says None, the figures 'yes'"),
        ({}, "better: no sentence has been written"),
    ],
)
def test_a_sentence_that_contradicts_the_figures_is_noticed_and_not_told(said: dict[str, Any], problem: str) -> None:
    study = study_of(**said)
    (found,) = contradictions(study)
    assert found.startswith(problem)
    made = section(study, "picture.png")
    assert "No sentence has been written on these figures" in made
    assert "sentence" not in said or said["sentence"] not in made


def test_a_recipe_without_its_partner_or_with_other_seeds_is_not_compared() -> None:
    study = study_of(verdict="yes", sentence="It is {difference}.")
    alone = Study(study.entries, {"better": study.rows["better"]})
    fewer = Study(study.entries, {"softmax": row([5.0]), "better": study.rows["better"]})
    others = {"softmax": replace(study.rows["softmax"], seeds=[0, 1, 2])}
    others["better"] = replace(study.rows["better"], seeds=[0, 1, 3])
    for each in (alone, fewer, Study(study.entries, others)):
        assert each.comparison("better") is None
        assert each.verdicts("better") == {}
        made = section(each, "x.png")
        assert "[better](#better)" in made
        assert "What it is compared with has not been trained with the same seeds." in made


def test_only_the_measured_part_of_the_page_is_replaced() -> None:
    page = (ROOT / "docs" / "routing.md").read_text()
    made = replaced(page, section(study_of(), "x.png"))
    assert made.startswith(page.split("<!-- results")[0])
    assert made.endswith(page.split("<!-- end of results -->")[1])
    assert replaced(made, section(study_of(), "x.png")) == made


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_is_drawn(seeds: int, tmp_path: Path) -> None:
    entries = {name: entry(name) for name in LINE} | {"better": entry("better", ["quality"], "softmax")}
    rows = {name: row(each.loss[:seeds], each.active[0]) for name, each in LINE_ROWS.items()}
    write_picture(Study(entries, rows | {"better": row([4.9, 5.0, 4.8][:seeds])}), tmp_path / "assets" / "a.png")
    assert (tmp_path / "assets" / "a.png").read_bytes().startswith(b"\x89PNG")
