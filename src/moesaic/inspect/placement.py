"""Affinity placement of a model on disk: from its folder and a routing trace to a placed folder and a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.errors import CheckpointError, DataError
from moesaic.hf.load import load_config, model_folder
from moesaic.hf.placement import MoEBlock, moe_blocks, permute_experts
from moesaic.hf.save import check_new
from moesaic.inspect.report import TRACE
from moesaic.inspect.trace import LayerTrace, RoutingTrace
from moesaic.parallel.placement.place import (
    MAX_IMBALANCE,
    LayerRouting,
    LayerTraffic,
    Placement,
    check_numbers,
    place,
    traffic,
)

HELD_OUT = 4
"""One document in so many is measured on, the others are optimized on."""


@dataclass(frozen=True)
class Placed:
    """What a placement saves (see :func:`place_folder`), and the folder that was written, or None."""

    report: dict[str, Any]
    folder: Path | None


def place_folder(
    path: str | Path,
    trace: str | Path,
    ranks: int,
    *,
    out: str | Path | None = None,
    hosts: int = 1,
    seconds: float = 60.0,
    max_imbalance: float = MAX_IMBALANCE,
    objective: str = "transitions",
) -> Placed:
    """Place the experts of the model in ``path`` by :func:`moesaic.parallel.placement.place.place`; say what it saves.

    Optimized is what three of four documents of the trace say; the report's figures are of the others.

    Args:
        path: a model folder, or the folder of a training run.
        trace: a file that ``moesaic inspect`` wrote of this model, or the folder of its report.
        out: the folder to write the placed model to; None: only the report.

    Returns:
        The report has ``ranks``, ``hosts``, ``objective``, ``max_imbalance``, ``seconds`` (that were used), ``tokens``
        (optimized on, held out), ``programs`` (what :class:`moesaic.parallel.placement.stages.Stage` holds, and its
        gap), ``before`` and ``after`` (:class:`~moesaic.parallel.placement.place.LayerTraffic`, means over layers, the
        largest imbalance) and ``layers``: the same of each, with its number, its experts, ``rank_of_expert`` and
        ``order``: the expert that each position holds in the placed model.

    Raises:
        CheckpointError: where there is no usable model, the trace is of another one, or ``out`` exists already.
        UsageError, UnsupportedError: as :func:`moesaic.hf.placement.moe_blocks` and :func:`permute_experts` raise them.
        ConfigError, DataError, MissingDependencyError: as :func:`moesaic.parallel.placement.place.place` raises them;
            DataError also for a trace that cannot be read or is too short to hold something out.
    """
    check_numbers(ranks, hosts, seconds, max_imbalance, objective)
    if out is not None:
        check_new(out)
    folder = model_folder(path)
    blocks = moe_blocks(folder)
    traced = load_trace(trace)
    check_same_model(traced, folder, blocks)
    held_out = held_out_tokens(traced)
    groups = [block.groups for block in blocks]
    solution = place(
        _routing(traced, ~held_out, groups),
        ranks,
        hosts=hosts,
        seconds=seconds,
        max_imbalance=max_imbalance,
        objective=objective,
    )
    measured_on = _routing(traced, held_out, groups)
    before = traffic(measured_on, Placement.contiguous(measured_on, ranks), hosts)
    after = traffic(measured_on, solution.placement, hosts)
    orders = {block.number: solution.placement.order(level) for level, block in enumerate(blocks)}
    report = {
        "ranks": ranks,
        "hosts": hosts,
        "objective": objective,
        "max_imbalance": max_imbalance,
        "seconds": solution.seconds,
        "tokens": {"optimized": int((~held_out).sum()), "held_out": int(held_out.sum())},
        "programs": [{**asdict(stage), "gap": stage.gap} for stage in solution.stages],
        "before": _whole(before),
        "after": _whole(after),
        "layers": [
            {
                "number": block.number,
                "experts": block.num_experts,
                "before": asdict(before[level]),
                "after": asdict(after[level]),
                "rank_of_expert": solution.placement.rank_of[level].tolist(),
                "order": orders[block.number].tolist(),
            }
            for level, block in enumerate(blocks)
        ],
    }
    if out is None:
        return Placed(report, None)
    return Placed(
        report, permute_experts(folder, orders, out, {"ranks": ranks, "hosts": hosts, "objective": objective})
    )


def held_out_tokens(trace: RoutingTrace) -> npt.NDArray[np.bool_]:
    """``[N]``: the tokens of every fourth document; of every fourth passage, or the last quarter of the text, where
    there are too few documents or passages.

    Raises:
        DataError: for a trace of fewer than four tokens.
    """
    documents = [(passage.domain, passage.document) for passage in trace.passages]
    numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
    of_passage = np.array([numbers[document] for document in documents], dtype=np.int64)
    for units in (of_passage[trace.passage_ids], trace.passage_ids, _quarters(trace.num_tokens)):
        if len(units) and units.max() >= HELD_OUT - 1:
            held_out: npt.NDArray[np.bool_] = units % HELD_OUT == HELD_OUT - 1
            return held_out
    raise DataError(f"the trace has {trace.num_tokens} tokens: too few to place by some and measure on others")


def _quarters(num_tokens: int) -> npt.NDArray[np.int64]:
    return np.arange(num_tokens) * HELD_OUT // max(1, num_tokens)


def load_trace(trace: str | Path) -> RoutingTrace:
    """A trace from its file, or from the folder of the report that it belongs to.

    Raises:
        DataError: where it is missing, damaged, or no routing trace.
    """
    path = Path(trace)
    return RoutingTrace.load(path / TRACE if path.is_dir() else path)


def check_same_model(trace: RoutingTrace, folder: Path, blocks: Sequence[MoEBlock]) -> None:
    """Refuse a trace that is not of the model in ``folder``, as far as its layers and experts tell.

    Raises:
        CheckpointError: where it is of another model.
    """
    traced = {layer.number: layer.num_experts for layer in trace.layers}
    there = {block.number: block.num_experts for block in blocks}
    architectures = getattr(load_config(folder), "architectures", None) or [trace.model.architecture]
    if trace.model.architecture not in architectures:
        reason = f"it is of a {trace.model.architecture}, this is a {architectures[0]}"
    elif traced.keys() != there.keys():
        reason = f"it has MoE layers {_list(traced)}, the model {_list(there)}"
    elif wrong := [number for number in traced if traced[number] != there[number]]:
        number = wrong[0]
        reason = f"its layer {number} has {traced[number]} experts, the model's {there[number]}"
    else:
        return
    raise CheckpointError(
        f"the trace is of another model than {str(folder)!r}: {reason}; record one by moesaic inspect"
    )


def _list(numbers: dict[int, int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _routing(trace: RoutingTrace, tokens: npt.NDArray[np.bool_], groups: Sequence[int]) -> list[LayerRouting]:
    """Where a layer routes several times in one forward, the slots of all times count as one."""
    layers: defaultdict[int, list[LayerTrace]] = defaultdict(list)
    for layer in trace.layers:
        layers[layer.number].append(layer)
    return [
        LayerRouting(np.concatenate([time.expert_ids[tokens] for time in times], axis=1), times[0].num_experts, own)
        for (_, times), own in zip(sorted(layers.items()), groups, strict=True)
    ]


def _whole(layers: Sequence[LayerTraffic]) -> dict[str, float]:
    """The means over the layers, and the largest imbalance."""
    means = {
        name: float(np.mean([value for layer in layers if (value := getattr(layer, name)) is not None]))
        for name in ("crossing", "host_crossing", "rows", "host_rows")
    }
    return {**means, "imbalance": max(layer.imbalance for layer in layers)}
