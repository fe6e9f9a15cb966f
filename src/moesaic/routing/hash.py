"""A fixed choice by the token's id: nothing is learned. A floor for comparisons."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.context import RoutingContext
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("hash")
class Hash(Router):
    """Hash routing (Hash Layers For Large Sparse Models, section 3.1): each id of the vocabulary has its experts.

    It has no parameters, gets no gradient, and reads ``token_ids`` of the :class:`RoutingContext` only. What it draws
    when it is made differs from layer to layer and is saved with the model. With K > 1 a token takes K different
    experts, 1/K each; the paper's MultiHash has each of them compute a part of the hidden width instead.

    Args:
        vocab_size: 0 lets every id fall on any expert (the paper's random hash). Otherwise the number of token ids,
            which are spread so that every expert gets equally many of them (ids from there on start over).
        by_frequency: the paper's balanced hash, equally many *tokens*: whoever trains the model calls :meth:`assign`
            with the frequencies of the training text, as ``moesaic train`` does; until then ids are spread as without.
            It is the same in every layer, and saved with the model.
    """

    reads_context = True
    has_logits = False

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, vocab_size: int = 0, by_frequency: bool = False
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if vocab_size < 0:
            raise ConfigError(f"vocab_size is {vocab_size}: it must be at least 0")
        if by_frequency and not vocab_size:
            raise ConfigError("by_frequency needs vocab_size, the number of token ids: it is 0")
        self.vocab_size, self.wants_frequencies = vocab_size, by_frequency
        self.register_parameter("weight", None)
        self.register_buffer("drawn", torch.zeros(vocab_size or 1, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw another hash: a permutation of the vocabulary, or the number that all ids are mixed with."""
        drawn = self._buffers.get("drawn")  # not there yet while the base class is built
        if drawn is not None and self.vocab_size:
            drawn.copy_(torch.randperm(self.vocab_size, device=drawn.device))
        elif drawn is not None:
            drawn.random_(2**31)

    @torch.no_grad()
    def assign(self, frequencies_V: Tensor) -> None:
        """The paper's balanced hash: ids in the order of their frequency, each to the expert with the fewest tokens.

        It evens out the first slot; the others stay even in the number of ids.

        Args:
            frequencies_V: ``[vocab_size]``, how often each id occurs in the corpus, in any unit.

        Raises:
            ConfigError: for another number of frequencies, or a router without ``vocab_size``.
        """
        if frequencies_V.shape != (self.vocab_size,) or not self.vocab_size:
            raise ConfigError(
                f"there are {frequencies_V.numel()} frequencies: the router's vocab_size is {self.vocab_size}"
            )
        tokens = [(0.0, expert) for expert in range(self.num_experts)]
        ids_of_expert = [0] * self.num_experts
        places = [0] * self.vocab_size
        frequencies = frequencies_V.tolist()
        for token_id in frequencies_V.argsort(descending=True, stable=True).tolist():
            load, expert = tokens[0]
            heapq.heapreplace(tokens, (load + frequencies[token_id], expert))
            places[token_id] = ids_of_expert[expert] * self.num_experts + expert
            ids_of_expert[expert] += 1
        drawn = self.get_buffer("drawn")
        drawn.copy_(torch.tensor(places, device=drawn.device))

    def forward(self, x_TD: Tensor, top_k: int | None = None, context: RoutingContext | None = None) -> Routing:
        top_k, token_ids = self.slots(top_k), None if context is None else context.token_ids
        if token_ids is None:
            raise ConfigError(
                "the router 'hash' needs the token ids: call the model with input_ids, not with inputs_embeds, "
                "or the layer with context=RoutingContext(token_ids=...)"
            )
        token_ids_T = token_ids.reshape(-1)
        if token_ids_T.shape[0] != x_TD.shape[0]:
            raise ConfigError(f"there are {token_ids_T.shape[0]} token ids for {x_TD.shape[0]} tokens")
        expert_ids_TK = self._experts(self._places(token_ids_T), top_k)
        weights_TK = x_TD.new_full(expert_ids_TK.shape, 1 / top_k, dtype=torch.float32)
        scores_TE = weights_TK.new_zeros(x_TD.shape[0], self.num_experts).scatter(1, expert_ids_TK, weights_TK)
        return Routing(expert_ids_TK, weights_TK, scores_TE)

    def _places(self, ids_T: Tensor) -> Tensor:
        """``[T]``: a number of each id; its remainder by E is the first expert, the quotient decides on the others."""
        drawn = self.get_buffer("drawn")
        if self.vocab_size:
            return drawn[ids_T % self.vocab_size]
        mixed_T = (ids_T ^ drawn) & 0xFFFFFFFF
        for _ in range(2):  # 32 bits times 27 bits: nothing overflows
            mixed_T = ((mixed_T ^ (mixed_T >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return mixed_T ^ (mixed_T >> 16)

    def _experts(self, places_T: Tensor, top_k: int) -> Tensor:
        """``[T, K]``: one expert, then others that follow it at a distance which goes round with the quotient."""
        experts = self.num_experts
        slots_K = torch.arange(top_k, device=places_T.device)
        first_T1, round_T1 = (places_T % experts).unsqueeze(1), (places_T // experts).unsqueeze(1)
        distances_TK = torch.where(slots_K == 0, 0, 1 + (round_T1 + slots_K - 1) % max(experts - 1, 1))
        return (first_T1 + distances_TK) % experts
