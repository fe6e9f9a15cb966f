"""Dense models become mixtures of experts, models are merged, experts pruned: from one folder on disk to another.

The whole model is never in memory: tensors are read one at a time and written a shard at a time
(:mod:`moesaic.convert.writing`), and an interrupted conversion goes on where it stopped.
"""

from __future__ import annotations

from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.distilling import Distilled, DistillSettings, distill
from moesaic.convert.measured import gguf_model
from moesaic.convert.merging import MERGES, Merged, MergeSettings, merge
from moesaic.convert.pruning import Pruned, PruneSettings, prune
from moesaic.convert.source import TensorSource, open_source
from moesaic.convert.splitting import Split, SplitSettings, split
from moesaic.convert.taught import Taught, split_and_distill
from moesaic.convert.unpacking import unpack
from moesaic.convert.upcycling import Upcycled, UpcycleSettings, upcycle
from moesaic.convert.writing import Output, Written, write_model

__all__ = [
    "MERGES",
    "DenseModel",
    "DistillSettings",
    "Distilled",
    "MergeSettings",
    "Merged",
    "Output",
    "PruneSettings",
    "Pruned",
    "Split",
    "SplitSettings",
    "Taught",
    "TensorSource",
    "UpcycleSettings",
    "Upcycled",
    "Written",
    "check_dense",
    "distill",
    "gguf_model",
    "merge",
    "open_source",
    "prune",
    "split",
    "split_and_distill",
    "unpack",
    "upcycle",
    "write_model",
]
