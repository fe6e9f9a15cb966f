"""Whole requests: our engine and server under loads, against those of others.

Each of :data:`PARTS` measures one or more rows of the table of targets for serving and can run alone.
"""

from __future__ import annotations

from moesaic.bench.part import Part
from moesaic.bench.serving.models import olmoe_folder
from moesaic.bench.serving.parts import PARTS

__all__ = ["PARTS", "Part", "olmoe_folder"]
