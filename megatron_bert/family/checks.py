# SPDX-License-Identifier: Apache-2.0
"""What kind of thing an argument is: tensors and their devices and number formats, switches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.configuration_checks import NUMBER_FORMATS
from parallel.errors import UserError, its_class

#: What is true or false, a number of 0 or 1 included: they are equal as keys.
_TRUTH = {False: False, True: True}


def computing_device(model: Any) -> torch.device | None:
    """Where a model computes; None where FSDP or Accelerate may bring its parameters there from elsewhere.

    Raises:
        UserError: it holds no values.
    """
    if hasattr(model, "set_reshard_after_forward") or is_dispatched(model):  # FSDP's module is slow to import
        return None
    check_filled(model)
    return model.device


def is_dispatched(model: Any) -> bool:
    """Whether a device map has put parts of a model on several devices, or on the disk."""
    base = model.base_model
    layers = base.encoder.layer
    parts = (base, base.embeddings, base.embeddings.word_embeddings, base.encoder, *layers[:1], *layers[-1:])
    return any("_hf_hook" in vars(part) for part in parts)


def check_filled(model: Any) -> None:
    """Refuse a model without values.

    Raises:
        UserError: its parameters are on the meta device.
    """
    if model.device.type == "meta" and not is_dispatched(model):
        raise UserError(f"{type(model).__name__} is on the meta device, where it holds no values: load it on another")


def check_device(device: torch.device | str | int | None) -> None:
    """Refuse what torch cannot make tensors on; None is its own choice.

    Raises:
        UserError: no device, or none that this machine has.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"device is {described(device)}, which torch does not take here ({reason}): give cpu or another"
        ) from None


def check_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """What is given under a name, which must be a plain tensor of real numbers.

    Args:
        device: where it must be; None if that does not matter.

    Raises:
        UserError: it is another kind of thing, or elsewhere.
    """
    if not isinstance(value, Tensor):
        raise UserError(f"{name} is {its_class(value)}: give a tensor")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else "sparse"
        raise UserError(f"{name} is a {kind} tensor: give one with all its values, padded to one length")
    if value.is_complex():
        raise UserError(f"{name} is of type {value.dtype}: give real numbers")
    if device is not None and value.device != device:
        raise UserError(f"{name} is on {value.device}, but the model on {device}: move one of them to the other")
    return value


def checked_switch(name: str, value: Any) -> bool:
    """What is given under a name, which must be true or false.

    Raises:
        UserError: it is neither.
    """
    try:
        return _TRUTH[value]
    except (KeyError, TypeError):
        raise UserError(f"{name} is {described(value)}: give True or False") from None


def described(value: Any) -> str:
    """A wrong value in few words: itself, or its type where it is long."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else its_class(value)


def check_whole(name: str, numbers: Tensor) -> None:
    """Refuse anything but whole numbers.

    Raises:
        UserError: the tensor is not of int64 or int32.
    """
    if numbers.dtype not in (torch.int64, torch.int32):
        raise UserError(f"{name} is of type {numbers.dtype}: give int64")


def promoted(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point values in the model's type: narrower ones are widened; autocast converts all but float64 itself.

    Raises:
        UserError: they are of a type that is wider than the model's, or of none that a model may have.
    """
    if str(values.dtype).removeprefix("torch.") not in NUMBER_FORMATS:
        raise UserError(f"{name} is of type {values.dtype}: give floating-point numbers of the model's type, {dtype}")
    if torch.is_autocast_enabled(values.device.type) and values.dtype != torch.float64:
        return values
    if torch.promote_types(values.dtype, dtype) != dtype:
        raise UserError(f"{name} is of type {values.dtype}, but the model of {dtype}: convert one of them")
    return values.to(dtype)
