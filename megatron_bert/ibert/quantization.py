# SPDX-License-Identifier: Apache-2.0
"""From a float model to a quantized one, and back and forth between its modes.

The modules of the model change their class in place, as PyTorch's own fully sharded data parallelism does it:
parameters, their names, hooks and references to modules stay, and each quantized module gains quantizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from megatron_bert.ibert.embeddings import QuantizedEmbeddings
from megatron_bert.ibert.equalization import equalize_model
from megatron_bert.ibert.heads import QuantizedDense, QuantizedMaskedLanguageHead, QuantizedPooler
from megatron_bert.ibert.layer import QuantizedTransformerLayer, check_layer
from megatron_bert.ibert.modules import Mode, Quantized, QuantizedLayerNorm
from megatron_bert.ibert.quantizer import MODULE_ENDING, Quantizer
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.model.effective_weights import is_adapted
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.heads import Dense, MaskedLanguageHead, Pooler
from parallel.errors import UserError

#: Modules that are replaced whole: what is inside of them is not looked at.
_SIMPLE: dict[type[nn.Module], type[Quantized]] = {
    BertEmbeddings: QuantizedEmbeddings,
    MaskedLanguageHead: QuantizedMaskedLanguageHead,
    Pooler: QuantizedPooler,
    Dense: QuantizedDense,
    nn.Linear: QuantizedDense,
}


def quantize_model(model: nn.Module, settings: QuantizationConfig, *, equalize: bool = True) -> nn.Module:
    """Make a model compute in integers: its embeddings, layers, final norm, pooler and heads.

    Its ranges are to be calibrated next. Data parallelism is applied after this, not before.

    Args:
        model: any that is built of ``megatron_bert.model``'s encoder, embeddings and heads, or a pipeline stage of one.
        settings: bit widths and exceptions.
        equalize: do what ``settings.equalization`` says, which changes parameters; False where they are about to be
            loaded from a quantized model's checkpoint.

    Returns:
        ``model`` itself, changed.

    Raises:
        UserError: it is quantized already, holds no encoder, or has what integers do not cover; it is then unchanged.
    """
    if is_quantized(model):
        raise UserError("the model is quantized already: quantize a float model")
    if any(is_adapted(module) for module in model.modules()):
        raise UserError("the model has adapters: merge them first (merge_and_unload), or quantize before adding them")
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    if not encoders:
        raise UserError(f"{type(model).__name__} holds no encoder: quantize a model with one")
    _check_layers(model, encoders, settings)
    if equalize:
        equalize_model(encoders, settings.equalization)
    for encoder in encoders:
        for number, module in encoder.layers.items():
            module.__class__ = _quantized_class(module, QuantizedTransformerLayer)
            module.quantize(settings, int(number))  # type: ignore[operator]
        if encoder.final_norm is not None:
            encoder.final_norm.__class__ = QuantizedLayerNorm
            encoder.final_norm.quantize(settings)  # type: ignore[operator]
    _change(model, settings)
    return model


def _check_layers(model: nn.Module, encoders: list[Encoder], settings: QuantizationConfig) -> None:
    for encoder in encoders:
        for layer in encoder.layer_list():
            check_layer(layer, settings)
    # A pipeline stage has some of its model's layers, whose number its configuration knows.
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    count = max(1 + int(number) for encoder in encoders for number in encoder.layers) if count is None else count
    absent = sorted(number for number in settings.layer_force_dequant if not 0 <= number < count)
    if absent:
        raise UserError(
            f"layer_force_dequant names layer {absent[0]}, but the model has layers 0 to {count - 1}: give one of them"
        )


def _quantized_class(module: nn.Module, plain: type[Quantized] | None) -> Any:
    """What a module becomes: that of the documented classes, which take their time to import, or the plain one."""
    if type(module).__module__ != "megatron_bert.family.modules":
        return plain
    from megatron_bert.ibert.documented import QUANTIZED

    return QUANTIZED.get(type(module), plain)


def _change(module: nn.Module, settings: QuantizationConfig) -> None:
    tanh: tuple[str, ...] = getattr(module, "followed_by_tanh", ())
    for name, child in module.named_children():
        if isinstance(child, Quantized):
            continue
        replacement = QuantizedPooler if name in tanh else _quantized_class(child, _SIMPLE.get(type(child)))
        if replacement is not None:
            child.__class__ = replacement
            child.quantize(settings)  # type: ignore[operator]
        else:
            _change(child, settings)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Quantized modules with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def is_quantized(model: nn.Module) -> bool:
    """Whether any of its modules is quantized."""
    return any(True for _ in quantized_modules(model))


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Quantizers with their names in a state dict, in the order of the model.

    The order is the same on ranks that hold the same modules.
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name.removesuffix(MODULE_ENDING), module


def named_ranges(model: nn.Module) -> dict[str, Tensor]:
    """The ranges by global name, for checkpoints; whole on every rank."""
    return {f"{name}.range": quantizer.range for name, quantizer in quantizers(model)}


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Let quantized modules compute in ``integer``, ``float`` or ``observe`` mode while the block lasts.

    ``float`` is the model as it was before, with the weights it has now: a reference, or a teacher.
    """
    modules = [module for _, module in quantized_modules(model)]
    before = [module.mode for module in modules]
    for module in modules:
        module.mode = mode
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.mode = old
