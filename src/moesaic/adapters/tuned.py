"""Some experts of a layer as parameters of their own, which are trained in the place of the fused ones' rows.

The fused parameter ``[E, ...]`` stays as it is and needs no gradient. Each call is parted in two: slots of the other
experts go through the base's weights, slots of the tuned ones through ``[n, ...]``, and the two sums are added. So
gradients, optimizer states and checkpoints are those of n experts, nothing of the size of E is copied or made in a
step, and no backend knows of it: the slots that a part leaves out are null slots, which cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.adapters.scoring import dispatch_of
from moesaic.dispatch import Dispatch
from moesaic.errors import UnsupportedError
from moesaic.experts import ExpertBank, ExpertWeights, compute_and_tell
from moesaic.experts.storage import ExpertStorage
from moesaic.hf.experts import parameter_names, weights_of
from moesaic.hf.quantized import check_implementation


class TunedExperts(nn.Module):
    """Float32 copies of some experts of ``module``, which compute for it until :meth:`put_back`.

    They have the names that the module gives its parameters, and the shapes ``[n, ...]``.

    Args:
        module: an :class:`moesaic.ExpertBank`, or an experts module of transformers that runs with experts
            implementation ``"moesaic"``.
        experts: their ids, ascending.

    Raises:
        UnsupportedError: for a variant of transformers' experts that we do not know, another experts implementation,
            and quantized experts.
    """

    def __init__(self, module: nn.Module, experts: Sequence[int]) -> None:
        super().__init__()
        base = plain_weights(module)
        self.experts = list(experts)
        self._names = parameter_names(module)
        for field, tensor in base.tensors().items():
            self.register_parameter(self._names[field], nn.Parameter(tensor.detach()[self.experts].float()))
        device, count = base.up.device, len(self.experts)
        # Expert id to the id in each part; what a part does not hold, and the null id, become its own null id.
        kept = torch.arange(base.num_experts + 1, device=device)
        kept[self.experts] = base.num_experts
        tuned = torch.full_like(kept, count)
        tuned[self.experts] = torch.arange(count, device=device)
        self.register_buffer("_kept", kept, persistent=False)
        self.register_buffer("_tuned", tuned, persistent=False)
        self._waiting: tuple[Tensor, Dispatch] | None = None
        self._hooks = [
            module.register_forward_pre_hook(self._part, with_kwargs=True),
            module.register_forward_hook(self._add),
        ]

    _kept: Tensor
    _tuned: Tensor

    def rows(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameter name to ``[n, ...]``, rounded to ``dtype``."""
        return {name: parameter.detach().to(dtype) for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def put_back(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Write the rows, rounded to ``dtype``, into the module's own parameters, which compute from now on."""
        for hook in self._hooks:
            hook.remove()
        for name, rows_n in self.rows(dtype).items():
            parameter = module.get_parameter(name)
            parameter[self.experts] = rows_n.to(parameter.dtype)

    def _part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module: keep the tuned experts' slots for later, and make them null slots."""
        whole = dispatch_of(module, args, kwargs)
        ids_TK = _expert_ids(whole)
        x_TD = args[0] if args else kwargs["hidden_states"]
        self._waiting = x_TD, Dispatch.from_slots(self._tuned[ids_TK], whole.weights, len(self.experts))
        if isinstance(module, ExpertBank):
            return (x_TD, Dispatch.from_slots(self._kept[ids_TK], whole.weights, whole.num_experts)), {}
        return (x_TD, self._kept[ids_TK], whole.weights), {}

    def _add(self, module: nn.Module, args: tuple[Any, ...], y_TD: Tensor) -> Tensor:
        """After the module: add what the tuned experts say."""
        assert self._waiting is not None
        (x_TD, dispatch), self._waiting = self._waiting, None
        ours: dict[str, Any] = {field: self.get_parameter(name) for field, name in self._names.items()}
        tuned_TD, _ = compute_and_tell(x_TD, dispatch, replace(plain_weights(module), **ours))
        return y_TD + tuned_TD.to(y_TD.dtype)


def plain_weights(module: nn.Module) -> ExpertWeights:
    """A module's float weights.

    Raises:
        UnsupportedError: where there are none, or experts are not run by us.
    """
    if isinstance(module, ExpertStorage) and module.format is not None:
        raise UnsupportedError(f"the experts are quantized ({module.format.name}): tune experts of the float model")
    check_implementation(module)
    return module.weights() if isinstance(module, ExpertBank) else weights_of(module)


def _expert_ids(dispatch: Dispatch) -> Tensor:
    """``[T, K]`` int64: the expert of each slot, E for a null slot."""
    expert_N = dispatch.expert_of_row()
    return torch.cat([expert_N, expert_N.new_full((1,), dispatch.num_experts)])[dispatch.inverse]
