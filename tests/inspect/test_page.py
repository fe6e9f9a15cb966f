"""The page: it needs nothing else, and no text can become code in it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.inspect.traces import PIECES, made_up_trace

from moesaic.inspect import RoutingTrace, analyze
from moesaic.inspect.findings import find
from moesaic.inspect.page import render_page


def page_of(trace: RoutingTrace) -> str:
    report = analyze(trace)
    return render_page(trace, report, find(report))


class Elements(HTMLParser):
    """Every element with its attributes and text, as a browser's parser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for found, attributes, text in self.found if found == tag]


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    # One domain's name is hostile too: it is the user's.
    return made_up_trace([(6, 2), (300, 2)], ("code", '<img src=x onerror="alert(1)">'), null_share=0.1)


@pytest.fixture(scope="module")
def page(trace: RoutingTrace) -> str:
    return page_of(trace)


@pytest.fixture(scope="module")
def data(page: str) -> dict[str, Any]:
    (text,) = [text for attributes, text in Elements(page).of("script") if attributes.get("id") == "data"]
    return json.loads(text)


def test_nothing_comes_from_outside(page: str) -> None:
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    elements = Elements(page)
    for tag, attributes, _ in elements.found:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "href", "srcset"} & set(attributes)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
    (policy,) = [a["content"] for a, _ in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_no_text_becomes_code(page: str, trace: RoutingTrace) -> None:
    elements = Elements(page)
    assert len(elements.of("script")) == 2  # the data, and our own
    assert "alert(1)" not in "".join(text for attributes, text in elements.of("script") if not attributes)
    assert elements.of("title")[0][1].strip() == "tiny <&> model · routing report"
    assert elements.of("h1")[0][1].strip() == "tiny <&> model"
    assert not [attributes for _, attributes, _ in elements.found if any(name.startswith("on") for name in attributes)]
    script = "".join(text for attributes, text in elements.of("script") if not attributes)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)


def test_the_data_comes_back(data: dict[str, Any], trace: RoutingTrace) -> None:
    assert data["domains"] == trace.domains
    assert [layer["experts"] for layer in data["layers"]] == [6, 300]
    pieces = [piece for passage in data["passages"] for piece in passage["pieces"]]
    assert pieces == [PIECES[token] for token in trace.token_ids]
    for layer, packed in zip(trace.layers, data["top"], strict=True):
        kind = "<u1" if layer.num_experts < 256 else "<u2"
        assert np.array_equal(np.frombuffer(base64.b64decode(packed), kind), layer.top_expert)


def test_examples_point_at_the_experts_tokens(data: dict[str, Any], trace: RoutingTrace) -> None:
    starts = [passage["start"] for passage in data["passages"]]
    assert starts == [passage.start for passage in trace.passages]  # all of it fits: positions are the trace's
    for layer, traced in zip(data["layers"], trace.layers, strict=True):
        for expert, positions in enumerate(layer["examples"]):
            assert all(expert in traced.expert_ids[position] for position in positions)


def test_the_page_says_which_entropy() -> None:
    trace = made_up_trace()
    assert "Here it is the entropy of the router's scores of all experts" in page_of(trace)
    for layer in trace.layers:
        layer.entropy_source = "weights"
    assert "Here it is the entropy of the weights of the chosen experts only" in page_of(trace)
    trace.layers[1].entropy_source = "scores"
    assert "In layer 1 it is the entropy of the router's scores" in page_of(trace)


def test_spending_is_shown_where_it_varies(data: dict[str, Any]) -> None:
    assert data["spent"] is None
    trace = made_up_trace(null_share=0.4, adaptive=True, zero_computation=["zero"], numbers=[1, 1, 2])
    report, page = analyze(trace), page_of(trace)
    (text,) = [text for attributes, text in Elements(page).of("script") if attributes.get("id") == "data"]
    shown = json.loads(text)
    spent, kinds = shown["spent"], report["experts_per_token"]["by_kind"]
    assert [layer["label"] for layer in shown["layers"]] == ["1.1", "1.2", "2"]
    assert spent["tokens"] == [of["tokens"] for of in kinds.values()]
    assert len(spent["all"]) == len(spent["kinds"]) == 1 + len(trace.layers)
    assert {len(of) for of in spent["kinds"]} == {len(spent["names"])} == {len(kinds)}
    for layer, (mean, spread, free) in zip(report["layers"], spent["all"][1:], strict=True):
        of = layer["experts_per_token"]
        assert (mean, spread, free) == pytest.approx((of["mean"], of["spread"], of["free"]), abs=1e-4)
    assert "of at most 1 to 2 a token" in page
    assert "(and 1 that compute nothing)" in page


def test_the_same_trace_gives_the_same_page(page: str, trace: RoutingTrace) -> None:
    assert page_of(trace) == page


def test_a_large_model_stays_small() -> None:
    trace = made_up_trace([(128, 8)] * 48, ("a", "b", "c"), tokens_per_passage=256, passages_per_domain=10)
    report = analyze(trace)
    page = render_page(trace, report, find(report))
    assert 500_000 < len(page.encode()) < 2_000_000
    # What had no room is left out whole: no example points at a passage that is not there.
    (text,) = [text for attributes, text in Elements(page).of("script") if attributes.get("id") == "data"]
    data = json.loads(text)
    shown = sum(len(passage["pieces"]) for passage in data["passages"])
    assert shown < trace.num_tokens
    assert max(p for layer in data["layers"] for own in layer["examples"] for p in own) < shown


NEEDS_NODE = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
VARYING = {"null_share": 0.4, "adaptive": True, "zero_computation": ["zero"], "numbers": [1, 1, 2]}


@NEEDS_NODE
@pytest.mark.parametrize("varying", [{}, VARYING], ids=["alike", "varying"])
def test_the_script_draws_numbers_only(tmp_path: Path, varying: dict[str, Any]) -> None:
    elements = Elements(page_of(made_up_trace(**varying)))
    data, script = (text for _, text in elements.of("script"))
    (tmp_path / "page.js").write_text(script)
    ids = [attributes["id"] for _, attributes, _ in elements.found if "id" in attributes]
    (tmp_path / "page.json").write_text(json.dumps({"data": data, "ids": ids}))
    browser = Path(__file__).with_name("page_dom.js")
    command = ["node", str(browser), str(tmp_path / "page.js"), str(tmp_path / "page.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)
    assert drawn["wrong"] == []
    assert drawn["made"] > 500


@NEEDS_NODE
def test_the_script_is_valid(page: str, tmp_path: Path) -> None:
    (script,) = [text for attributes, text in Elements(page).of("script") if not attributes]
    (tmp_path / "page.js").write_text(script)
    checked = subprocess.run(
        ["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
