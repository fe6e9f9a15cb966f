"""What a mixture's configuration says of its experts, and what it is to say when there are fewer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from moesaic.convert.dense import EXPERT_COUNTS
from moesaic.convert.source import TensorSource
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.placement import MoEBlock
from moesaic.routing import ROUTERS

TOP_KS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
"""How configurations of transformers call the number of a token's experts."""


def experts_of_a_token(source: TensorSource) -> int:
    """How many experts a token takes.

    Raises:
        UnsupportedError: where the configuration does not say so by a name that is known.
    """
    config = source.config.get_text_config()
    for name in TOP_KS:
        if isinstance(told := getattr(config, name, None), int) and told > 0:
            return told
    raise UnsupportedError(
        f"{str(source.path)!r} does not say how many experts a token takes: known are {', '.join(TOP_KS)}"
    )


def pruned_config(config: PretrainedConfig, before: int, keep: int) -> PretrainedConfig:
    """The configuration with ``keep`` experts in place of ``before``, and with all that hangs on their number such that
    tokens are routed as they were when the experts that went are not to be had.

    Groups of experts that are all open to a token (``n_group``) are none any more: what stays need not divide into
    them. Our own routers say themselves what hangs on the number (:meth:`moesaic.routing.Router.options_with_fewer`).
    """
    new = copy.deepcopy(config)
    text = new.get_text_config()
    for name in EXPERT_COUNTS:
        if getattr(text, name, None) == before:
            setattr(text, name, keep)
    if getattr(text, "n_group", None) and getattr(text, "topk_group", None) == text.n_group:
        text.n_group = text.topk_group = 1
    if isinstance(text, MoesaicConfig):
        kind = ROUTERS.get(text.router)
        text.router_options = kind.options_with_fewer(text.router_options or {}, before, keep)
    return new


def check_fits(config: PretrainedConfig, source: TensorSource, blocks: Sequence[MoEBlock], keep: int) -> None:
    """Refuse routers that the model of ``config`` would not load with rows for ``keep`` experts; reads no values.

    Raises:
        UnsupportedError: where there is no such model, or one of its routers' tensors has another shape.
    """
    where = f"{str(source.path)!r} cannot have {keep} experts in a layer"
    try:
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
    except (ConfigError, ValueError) as error:
        raise UnsupportedError(f"{where}: {error}") from error
    for block in blocks:
        for name in block.router:
            shape = list(source.shape(name))
            shape[shape.index(block.num_experts)] = keep
            if name in state and list(state[name].shape) != shape:
                raise UnsupportedError(f"{where}: {name} would be {shape}, its model has it {list(state[name].shape)}")
