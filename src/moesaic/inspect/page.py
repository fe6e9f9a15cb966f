"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from moesaic.inspect.findings import Finding, most_and_least
from moesaic.inspect.kinds import KINDS
from moesaic.inspect.spending import common_kinds
from moesaic.inspect.trace import Passage, RoutingTrace

# What a page may hold, so that it stays under about 2 MB for the largest models: shared out over their experts.
_TOKEN_ENTRIES = 24_000
_LINK_ENTRIES = 32_000
_TEXT_CELLS = 300_000
"""Tokens times layers."""
_SCRIPTS = ("dom.js", "map.js", "charts.js", "spending.js", "flow.js", "text.js", "start.js")


def render_page(trace: RoutingTrace, report: dict[str, Any], findings: Sequence[Finding]) -> str:
    """The whole page. All text that came from outside is escaped here, or set by the page's scripts as plain text."""
    files = resources.files("moesaic.inspect") / "page_files"
    parts = {
        "title": html.escape(report["model"]["name"]),
        "facts": _facts(report),
        "findings": "\n".join(_finding(finding) for finding in findings),
        "entropy": _entropy_note(report),
        "spending": html.escape(_spending_note(report)),
        "style": (files / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((files / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        "data": _script_safe(page_data(trace, report)),
    }
    template = (files / "page.html").read_text(encoding="utf-8")
    # In one pass, so that what is put in is never looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def _script_safe(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in, whatever its texts are."""
    plain = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(report: dict[str, Any]) -> str:
    model, data, layers = report["model"], report["data"], report["layers"]
    sparse = f"{len(layers)} of {model['num_layers']}" if len(layers) != model["num_layers"] else f"all {len(layers)}"
    experts, top_k = _range(layer["experts"] for layer in layers), _range(layer["top_k"] for layer in layers)
    spent = report["experts_per_token"]
    if spent["varies"]:
        top_k = f"{spent['mean']:.1f} of at most {top_k}"
    if free := [len(layer["zero_computation"]) for layer in layers if layer["zero_computation"]]:
        experts += f" (and {_range(free)} that compute nothing)"
    total, active = _short(model["total_parameters"]), _short(model["active_parameters"])
    facts = {
        "Architecture": model["architecture"],
        "MoE layers": sparse,
        "Experts": f"{experts} a layer, {top_k} a token",
        "Parameters": f"{total}, of which a token uses {active}",
        "Text": f"{data['tokens']:,} tokens of " + ", ".join(domain["name"] for domain in data["domains"]),
    }
    return "\n".join(f"<div><dt>{key}</dt><dd>{html.escape(value)}</dd></div>" for key, value in facts.items())


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _short(number: int) -> str:
    for size, sign in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{sign}"
    return str(number)


def _finding(finding: Finding) -> str:
    show = ""
    if finding.layer is not None and finding.expert is not None:
        show = f'<button class="link" data-layer="{finding.layer}" data-expert="{finding.expert}">Show it</button>'
    return f"<li><h3>{html.escape(finding.title)}</h3><p>{html.escape(finding.text)}</p>{show}</li>"


def _entropy_note(report: dict[str, Any]) -> str:
    known = [layer["label"] for layer in report["layers"] if layer["entropy_source"] == "scores"]
    full = "of the router's scores of all experts, divided by the logarithm of their number"
    chosen = (
        "of the weights of the chosen experts only, divided by the logarithm of their number, "
        "because this model does not tell the scores of the others"
    )
    if len(known) == len(report["layers"]):
        return f"Here it is the entropy {full}."
    if not known:
        return f"Here it is the entropy {chosen}."
    where = f"layer{'s' if len(known) > 1 else ''} {', '.join(known)}"
    return f"In {where} it is the entropy {full}; in the others, {chosen}."


def _spending_note(report: dict[str, Any]) -> str:
    """What one sees in the chart of kinds."""
    spent = report["experts_per_token"]
    if not spent["varies"]:
        return ""
    extremes = most_and_least(spent, report["data"]["tokens"])
    if extremes is None:
        return (
            "No kind of token gets clearly more experts than another: the choice hangs on other things than the kind."
        )
    (most, much), (least, little) = extremes
    times = f", {much / little:.1f} times as many as on {KINDS[least]}" if little else f", and none on {KINDS[least]}"
    return f"Over all layers, the model spends most on {KINDS[most]}{times}."


def page_data(trace: RoutingTrace, report: dict[str, Any]) -> dict[str, Any]:
    """What the page's scripts draw from; lists by domain begin with the whole where they have one entry more."""
    domains = [domain["name"] for domain in report["data"]["domains"]]
    experts = sum(layer["experts"] for layer in report["layers"])
    passages, positions = _embedded(trace)
    return {
        "domains": domains,
        "tokens": trace.num_tokens,
        "layers": [_layer(layer, domains, positions, experts) for layer in report["layers"]],
        "spent": _spent(report),
        "affinity": [[of["affinity"][key] for key in ("share", "chance")] for of in report["transitions"]],
        "links": [_links(transition["counts"], experts) for transition in report["transitions"]],
        "linked": [_linked(transition["counts"]) for transition in report["transitions"]],
        "passages": passages,
        "top": [_packed(layer.top_expert[list(positions)], layer.num_experts) for layer in trace.layers],
    }


def _layer(layer: dict[str, Any], domains: list[str], positions: dict[int, int], experts: int) -> dict[str, Any]:
    entries = max(2, _TOKEN_ENTRIES // experts)
    consistency, spent = layer["token_consistency"], layer["experts_per_token"]
    return {
        "number": layer["number"],
        "label": layer["label"],
        "experts": layer["experts"],
        "even": (spent["mean"] if spent["varies"] else layer["top_k"]) / layer["experts"],
        "sparsity": [layer["experts_per_token"]["sparsity"][of] for of in ("token", "chunk")],
        "share": [_short_list(layer["token_share"]), *_by_domain(layer["token_share_by_domain"], domains)],
        "mix": _by_domain(layer["domain_mix"], domains),
        "specialization": _short_list(layer["specialization"]),
        "entropy": [layer["entropy"], *(layer["entropy_by_domain"][name] for name in domains)],
        "imbalance": layer["imbalance"],
        "information": layer["domain_information"],
        "locality": [of["performance"] for of in layer["locality"]["segments"].values()],
        "caches": list(layer["locality"]["caches"].values()),
        "similarity": {name: of["mean"] for name, of in layer["similarity"].items()},
        "nearest": [
            [of["expert"], round(of["cosine"], 2)] for of in layer["similarity"].get("outputs", {}).get("nearest", [])
        ],
        "consistency": [consistency["share"], consistency["chance"]] if consistency["tokens"] else None,
        "tops": [
            [[top["text"], top["count"], round(top["lift"], 1)] for top in of_expert[:entries]]
            for of_expert in layer["top_tokens"]
        ],
        "examples": [
            [positions[example["position"]] for example in of_expert if example["position"] in positions][:entries]
            for of_expert in layer["examples"]
        ],
    }


def _spent(report: dict[str, Any]) -> dict[str, Any] | None:
    """Mean, spread and zero-computation experts, of the whole and then of each layer: of all tokens, and of each kind.

    ``rare`` kinds have too few tokens for their mean to say much. None where every token takes equally many experts.
    """
    whole = report["experts_per_token"]
    if not whole["varies"]:
        return None
    kinds = list(whole["by_kind"])
    common = common_kinds(whole, report["data"]["tokens"])
    tables = [whole, *(layer["experts_per_token"] for layer in report["layers"])]
    return {
        "names": [KINDS[kind] for kind in kinds],
        "tokens": [whole["by_kind"][kind]["tokens"] for kind in kinds],
        "rare": [kind not in common for kind in kinds],
        "all": [_three(table) for table in tables],
        "kinds": [[_three(table["by_kind"][kind]) for kind in kinds] for table in tables],
    }


def _three(numbers: dict[str, Any]) -> list[float]:
    return _short_list([numbers["mean"], numbers["spread"], numbers["free"]])


def _by_domain(values: dict[str, list[float]], domains: list[str]) -> list[list[float]]:
    return [_short_list(values[name]) for name in domains]


def _short_list(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _links(counts: list[list[int]], experts: int) -> list[list[int]]:
    """[expert, expert of the next layer, slots] of the strongest links of each expert."""
    entries = max(3, _LINK_ENTRIES // experts)
    links = []
    for i, row in enumerate(counts):
        strongest = sorted(range(len(row)), key=lambda j: -row[j])[:entries]
        links += [[i, j, row[j]] for j in sorted(strongest) if row[j]]
    return links


def _linked(counts: list[list[int]]) -> list[list[int]]:
    """Of all links, strong or not: the sum of each expert's, and of each expert's of the next layer."""
    table = np.asarray(counts, dtype=np.int64)
    return [table.sum(axis=1).tolist(), table.sum(axis=0).tolist()]


def _embedded(trace: RoutingTrace) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """The passages that the page shows, and for each of their tokens: position in the trace -> position in the page.

    A passage of each domain in turn, as many as there is room for.
    """
    room = max(256, _TEXT_CELLS // len(trace.layers))
    members = {name: [p for p in trace.passages if p.domain == name] for name in trace.domains}
    turns = sorted((turn, p.domain, p) for group in members.values() for turn, p in enumerate(group))
    taken: list[Passage] = []
    for _, _, passage in turns:
        room -= passage.stop - passage.start
        if room < 0 and taken:
            break
        taken.append(passage)
    positions: dict[int, int] = {}
    shown = []
    for passage in sorted(taken, key=lambda passage: passage.start):
        shown.append(
            {
                "domain": trace.domains.index(passage.domain),
                "document": passage.document,
                "start": len(positions),
                "pieces": [passage.text[a:b] for a, b in trace.spans[passage.start : passage.stop].tolist()],
            }
        )
        for position in range(passage.start, passage.stop):
            positions[position] = len(positions)
    return shown, positions


def _packed(experts: Any, num_experts: int) -> str:
    """Expert ids as base64 of little-endian 16-bit numbers, or of bytes where they fit."""
    kind = "<u1" if num_experts < 256 else "<u2"
    return base64.b64encode(np.asarray(experts).astype(kind).tobytes()).decode()
