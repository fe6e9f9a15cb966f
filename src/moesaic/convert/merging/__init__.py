"""Merging models that were fine-tuned from one base, through the base's task vectors.

A merge method is one file and one ``@MERGES.register(name)``: it is shown each tensor of the base with what every model
has added to it, some rows at a time.
"""

from __future__ import annotations

from moesaic.convert.merging.breadcrumbs import Breadcrumbs
from moesaic.convert.merging.consensus import Consensus
from moesaic.convert.merging.dare import Dare, DareTies
from moesaic.convert.merging.layers import LayerWeights, Place, parse_place
from moesaic.convert.merging.lineage import check_one_base, likeness
from moesaic.convert.merging.linear import Linear
from moesaic.convert.merging.method import MERGES, MergeMethod
from moesaic.convert.merging.run import Merged, MergeSettings, merge
from moesaic.convert.merging.slerp import Slerp
from moesaic.convert.merging.task_arithmetic import TaskArithmetic
from moesaic.convert.merging.ties import Ties
from moesaic.convert.merging.vectors import Piece, TaskVectors, magnitudes_at

__all__ = [
    "MERGES",
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "DareTies",
    "LayerWeights",
    "Linear",
    "MergeMethod",
    "MergeSettings",
    "Merged",
    "Piece",
    "Place",
    "Slerp",
    "TaskArithmetic",
    "TaskVectors",
    "Ties",
    "check_one_base",
    "likeness",
    "magnitudes_at",
    "merge",
    "parse_place",
]
