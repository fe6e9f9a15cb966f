"""Whether a call is only computed, so that values may be read and PyTorch's dispatcher passed by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Whether nobody compiles, traces or transforms a call on these tensors, and none of them is a subclass's."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(tensor) in _PLAIN for tensor in tensors)
    )
