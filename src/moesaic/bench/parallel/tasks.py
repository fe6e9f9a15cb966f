"""What ranks can be asked to measure, by name; each function is called on every rank with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesaic.bench.parallel.points import measure_point
from moesaic.bench.parallel.transfer import measure_transfer

TASKS: dict[str, Callable[..., Any]] = {
    "point": measure_point,
    "transfer": measure_transfer,
}
