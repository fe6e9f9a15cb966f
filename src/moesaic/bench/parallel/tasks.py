"""What ranks can be asked to measure, by name; each function is called on every rank with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesaic.bench.parallel.against_tutel import measure_tutel
from moesaic.bench.parallel.points import measure_point, measure_strategies
from moesaic.bench.parallel.sides import measure_exchanges, measure_overlap
from moesaic.bench.parallel.transfer import measure_transfer

TASKS: dict[str, Callable[..., Any]] = {
    "exchanges": measure_exchanges,
    "overlap": measure_overlap,
    "point": measure_point,
    "transfer": measure_transfer,
    "strategies": measure_strategies,
    "tutel": measure_tutel,
}
