"""Quantized experts for whole models: :func:`quantize`, and what transformers needs to save, load and name them.

transformers' own mechanism: the method ``"moesaic"`` in its registries of quantizers, ``quantization_config`` in
``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moesaic.errors import CheckpointError, ConfigError, UnsupportedError
from moesaic.experts.quantized import QuantFormat
from moesaic.experts.storage import ExpertStorage, buffer_names
from moesaic.hf.calibration import importance_of
from moesaic.hf.quantized import adopt, check_implementation, expert_modules

METHOD = "moesaic"
Model = TypeVar("Model", bound=nn.Module)


def quantize(
    model: Model, format: str, *, group: int | None = None, calibration: Iterable[Tensor] | None = None
) -> Model:
    """Store the routed experts' weights in 8 or 4 bits from now on, in place; everything else stays as it is.

    Activations keep their dtype: a backend turns the weights into floats as it goes. Gradients flow through the experts
    to what comes before them, but not to their weights, which are buffers now. ``save_pretrained`` and
    ``from_pretrained`` of a transformers model keep the codes to the bit; ``model.dequantize()`` makes floats of them.
    A matrix at a time: memory beyond the model's own is at most that of one matrix's codes.

    Args:
        model: an :class:`moesaic.ExpertBank`, a :class:`moesaic.MoE`, or any module that holds some, such as
            :class:`moesaic.MoesaicForCausalLM`; or a MoE model of transformers with
            ``experts_implementation="moesaic"``.
        format: ``"int8"``: one scale per output feature; ``"int4"``: one per group of inputs, searched for.
        group: inputs per scale of int4, 32 or 64 (the default).
        calibration: token ids ``[B, S]`` that the model is run on first; what the experts see there says which weights
            matter in the search for the scales.

    Returns:
        ``model`` itself.

    Raises:
        ConfigError: for an unknown format or group, a model without experts or with quantized ones, weights that are
            not finite, or calibration of a module that takes no token ids.
        UnsupportedError: where experts cannot be quantized: another experts implementation, or a variant that we do not
            know.
    """
    chosen = QuantFormat.named(format, group)
    modules = expert_modules(model)
    if not modules:
        raise ConfigError(f"{type(model).__name__} has no experts to quantize")
    for module in modules.values():
        check_implementation(module)
    classes = {name: type(module) for name, module in modules.items()}
    try:
        stores = {name: each if isinstance(each, ExpertStorage) else adopt(each) for name, each in modules.items()}
        for store in stores.values():
            store.check_quantizable()
        importance = importance_of(model, stores, calibration) if calibration is not None else {}
    except BaseException:
        # A model that is refused stays what it was.
        for name, module in modules.items():
            module.__class__ = classes[name]
        raise
    for name, store in stores.items():
        store.quantize(chosen, importance.get(name, (None, None)))
    if isinstance(model, PreTrainedModel):
        _tell_transformers(model, QuantizationConfig(format, group))
    return model


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):
    """How a model's experts are stored; ``quantization_config`` of ``config.json`` and of ``from_pretrained``.

    Args:
        format: ``"int8"`` or ``"int4"``.
        group: inputs per scale of int4, 32 or 64 (the default).

    Raises:
        ConfigError: for another format or group, or a setting that there is not.
    """

    def __init__(self, format: str = "int4", group: int | None = None, quant_method: str = METHOD, **unknown: Any):
        if quant_method != METHOD:
            raise ConfigError(f"quant_method is {quant_method!r}: it must be {METHOD!r}")
        if unknown:
            raise ConfigError(f"the quantization has no setting {', '.join(sorted(unknown))}; it has format and group")
        self.quant_method: Any = METHOD  # transformers' own are of an enumeration
        self.format = format
        self.group = QuantFormat.named(format, group).group or None

    def quant_format(self) -> QuantFormat:
        return QuantFormat.named(self.format, self.group)


@register_quantizer(METHOD)
class MoesaicQuantizer(HfQuantizer):
    """Loads quantized experts, or quantizes float ones as they are loaded, a matrix at a time."""

    quantization_config: QuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _use_our_experts(model)
        format = self.quantization_config.quant_format()
        modules = expert_modules(model)
        if not modules:
            raise ConfigError(f"{type(model).__name__} has no experts: there is nothing to quantize or to load so")
        for module in modules.values():
            store = module if isinstance(module, ExpertStorage) else adopt(module)
            if self.pre_quantized:
                store.make_room(format)
            else:
                store.format = format
            # Nothing in it is ever initialized: what a checkpoint lacks is refused below.
            store._is_hf_initialized = True  # type: ignore[assignment]
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        self._faults: list[CheckpointError] = []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._faults:
            raise self._faults[0]
        for name, module in expert_modules(model).items():
            assert isinstance(module, ExpertStorage)
            _check_loaded(name, module, self.pre_quantized)
        self._check_like_without_quantizer(model)
        return model

    def _check_like_without_quantizer(self, model: PreTrainedModel) -> None:
        """With a quantizer, transformers 5.17 takes tensors of any shape, and leaves those that a checkpoint has under
        another name in the dtype that it has them in."""
        kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, tensor in model.state_dict().items():
            shape, dtype = self._expected.get(name, (tensor.shape, tensor.dtype))
            if tensor.shape != shape:
                raise CheckpointError(
                    f"the weights do not match their configuration: {name} (saved {list(tensor.shape)}, "
                    f"configured {list(shape)})"
                )
            if tensor.dtype != dtype and not any(part in name for part in kept):
                parameter = model.get_parameter_or_buffer(name)
                parameter.data = parameter.data.to(dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        store = model.get_submodule(module)
        return not self.pre_quantized and isinstance(store, ExpertStorage) and name in store.matrices()

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self._faults)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for store in expert_modules(model).values():
            assert isinstance(store, ExpertStorage)
            store.dequantize(dtype or model.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """What transformers' Trainer asks before it trains adapters: gradients flow through the experts."""
        return True


class _QuantizeOnLoad(ConversionOps):
    """The last step of loading one matrix of the experts: it goes into its module as codes and scales."""

    def __init__(self, faults: list[CheckpointError]) -> None:
        self.faults = faults

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        model, full_layer_name, missing_keys = (kwargs[key] for key in ("model", "full_layer_name", "missing_keys"))
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        module, _, name = full_layer_name.rpartition(".")
        store: Any = model.get_submodule(module)
        try:
            store.quantize_matrix(name, weight, store.format)
        except ConfigError as error:
            # From here it would come out as transformers' table of conversion errors.
            self.faults.append(CheckpointError(f"{full_layer_name} cannot be quantized: {error}"))
            return {full_layer_name: [weight]}
        missing_keys.discard(full_layer_name)
        return {}


def _use_our_experts(model: PreTrainedModel) -> None:
    """transformers has no way to say that the default was not chosen: it is the one that may be changed."""
    chosen = model.config._experts_implementation
    if chosen not in ("moesaic", model.get_correct_experts_implementation(None)):
        raise UnsupportedError(f"quantized experts run with experts_implementation='moesaic' only, not with {chosen!r}")
    model.set_experts_implementation("moesaic")


def _check_loaded(name: str, store: ExpertStorage, pre_quantized: bool) -> None:
    for buffer in (buffer for matrix in store.matrices() for buffer in buffer_names(matrix)):
        tensor = getattr(store, buffer, None)
        # transformers marks what it has loaded; what it has not found holds anything.
        if tensor is None or (pre_quantized and not tensor.is_meta and not hasattr(tensor, "_is_hf_initialized")):
            raise CheckpointError(
                f"the weights do not match their configuration: {name}.{buffer} is missing or has another shape"
            )
        if tensor.dtype.is_floating_point and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}.{buffer} holds scales that are not finite: the checkpoint is damaged")


def _tell_transformers(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """What loading a quantized model would have left there."""
    quantizer = MoesaicQuantizer(config, pre_quantized=True)
    for name, value in {"is_quantized": True, "quantization_method": METHOD, "hf_quantizer": quantizer}.items():
        setattr(model, name, value)
    model.config.quantization_config = config
