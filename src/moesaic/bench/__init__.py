"""Side-by-side measurements: expert layers against others, and against the machine's limits."""

from __future__ import annotations

from moesaic.bench.experts import Plan, Result, Row, measure
from moesaic.bench.shapes import SHAPES, Shape, parse_shape
from moesaic.bench.workload import Workload

__all__ = ["SHAPES", "Plan", "Result", "Row", "Shape", "Workload", "measure", "parse_shape"]
