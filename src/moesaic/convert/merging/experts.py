"""Branch-Train-MiX: the feed-forwards of fine-tuned models side by side, as the experts of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moesaic.convert.banks import Experts, bank_outputs, sound
from moesaic.convert.dense import DenseModel
from moesaic.convert.writing import Output


def mixed_outputs(
    base: DenseModel, branches: Sequence[DenseModel], experts: Experts, merged: Callable[[str], Output]
) -> list[Output]:
    """The tensors of a model with one expert a branch.

    Args:
        base: whose sizes and dtype the model has.
        branches: the models whose feed-forwards become the experts, in their order.
        merged: the output of a tensor that is no expert's, such as the average of all branches.
    """
    outputs = [merged(name) for name in base.outside()]
    for layer in range(base.num_layers):
        outputs += [merged(name) for name in base.others(layer)]
        outputs += experts.routers.outputs(layer, base.d_model, base.dtype)
        outputs += _bank(base, branches, layer)
    return outputs


def _bank(base: DenseModel, branches: Sequence[DenseModel], layer: int) -> list[Output]:
    names = base.ffn(layer)

    def fill_up(expert: int, into_GD: Tensor) -> None:
        into_GD[: base.d_ff] = sound(branches[expert].source, names.gate)
        into_GD[base.d_ff :] = sound(branches[expert].source, names.up)

    def fill_down(expert: int, into_DF: Tensor) -> None:
        into_DF.copy_(sound(branches[expert].source, names.down))

    return bank_outputs(base, layer, len(branches), fill_up, fill_down)
