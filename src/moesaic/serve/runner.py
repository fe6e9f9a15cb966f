"""One step on the model: the chunks of many sequences as one row of tokens, and logits where a token is to follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.adapters.pool import AdapterPool
from moesaic.serve.attention import PagedBatch, PagedLayers, attention_by
from moesaic.serve.scheduler import Chunk


class Runner:
    """Runs a model over a paged KV cache.

    Args:
        model: prepared by :func:`moesaic.serve.model.prepare`.
        pools: attention module to its key and value pool.
        around: entered for each forward pass (isolation).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pools: Mapping[nn.Module, tuple[Tensor, Tensor]],
        page_size: int,
        adapters: AdapterPool | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.pools = pools
        self.page_size = page_size
        self.adapters = adapters
        self._around = around
        self._device = model.device
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], adapters: Sequence[int]) -> Tensor:
        """Compute the chunks' tokens; keys and values go into their pages.

        Args:
            adapters: index of each chunk's adapter, 0 for the base.

        Returns:
            float32 ``[N, V]``: the logits that follow each of the N chunks with ``last``, in order.
        """
        counts_S = np.fromiter((chunk.count for chunk in chunks), np.int64, len(chunks))
        ends_S = counts_S.cumsum()
        last_S = np.fromiter((chunk.last for chunk in chunks), np.bool_, len(chunks))
        ids_T = np.concatenate([chunk.sequence.tokens(chunk.start, chunk.start + chunk.count) for chunk in chunks])
        positions_T, batch = self._batch(chunks, counts_S, ends_S)
        rows_N = self._tensor(ends_S[last_S] - 1)
        with self._rerouted(adapters, counts_S), self._around(), attention_by(PagedLayers(self.pools, batch)):
            logits_1NV = self._forward(self._tensor(ids_T), positions_T, rows_N)
        return logits_1NV[0].float()

    def _forward(self, ids_T: Tensor, positions_T: Tensor, rows_N: Tensor) -> Tensor:
        inputs = {"input_ids": ids_T[None], "position_ids": positions_T[None], "use_cache": False}
        if self._keeps_rows:
            return self.model(**inputs, logits_to_keep=rows_N).logits  # type: ignore[no-any-return]
        return self.model(**inputs).logits[:, rows_N]  # type: ignore[no-any-return]

    def _batch(self, chunks: Sequence[Chunk], counts_S: Any, ends_S: Any) -> tuple[Tensor, PagedBatch]:
        tables_SP = np.zeros((len(chunks), max(chunk.sequence.num_pages for chunk in chunks)), np.int32)
        for row, chunk in zip(tables_SP, chunks, strict=True):
            row[: chunk.sequence.num_pages] = chunk.sequence.pages()
        firsts_S = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
        sequence_T = np.repeat(np.arange(len(chunks)), counts_S)
        positions_T = np.arange(ends_S[-1]) + np.repeat(firsts_S - (ends_S - counts_S), counts_S)
        pages_T = tables_SP[sequence_T, positions_T // self.page_size].astype(np.int64)
        return self._tensor(positions_T), PagedBatch(
            tables_SP=self._tensor(tables_SP),
            starts=self._tensor(np.concatenate([[0], ends_S]).astype(np.int32)),
            contexts=self._tensor((firsts_S + counts_S).astype(np.int32)),
            slots_T=self._tensor(pages_T * self.page_size + positions_T % self.page_size),
        )

    def _rerouted(self, adapters: Sequence[int], counts_S: Any) -> AbstractContextManager[None]:
        if self.adapters is None or not any(adapters):
            return nullcontext()
        indices_T = np.repeat(np.asarray(adapters, np.int64), counts_S)
        return self.adapters.using(torch.from_numpy(indices_T))

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self._device)
