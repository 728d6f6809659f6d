# SPDX-License-Identifier: Apache-2.0
"""Tensors without numbers at a fraction of what torch's own mode for them costs: what it found is not found twice."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_META = torch.device("meta")
_DEVICE = torch.ops.prim.device.default
_UNCERTAIN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class _Made(NamedTuple):
    """A tensor that an operator makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


#: By operator and arguments: what it makes (a list if several), the number of the argument that it returns, or () if
#: nothing; None where torch is asked every time.
_results: dict[tuple[Any, ...], Any] = {}
_UNKNOWN = object()


class ShapesMode(FakeTensorMode):
    """Gives every tensor a shape, a format and a storage, but no memory.

    Torch's own cache asks where in its storage each argument lies, so parameters that are views of one buffer are all
    new to it, and so is every view of them. Here the kernel of a view is called, which is quick, and what other
    operators make is remembered by shapes, strides and formats, on which alone it depends.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator on shapes."""
        device = asked_device(func, args)
        if device is not None:
            return device
        kwargs = kwargs or {}
        way = _way(func)
        if way == "run":
            return func(*args, **kwargs)
        if way == "view" and self._is_plain(args[0]):
            with in_kernel_invocation_manager(self):
                out = func(*args, **kwargs)
            place = args[0].fake_device
            if isinstance(out, Tensor):
                return FakeTensor(self, out, place)
            return [FakeTensor(self, value, place) for value in out]
        key: list[Any] = [func, torch.get_default_dtype()]
        numbered: list[Tensor] = []
        if way != "remembered" or not (
            self._describe(args, key, numbered) and self._describe(kwargs.items(), key, numbered)
        ):
            return super().__torch_dispatch__(func, types, args, kwargs)
        whole, given = tuple(key), (*args, *kwargs.values())
        found = _results.get(whole, _UNKNOWN)
        if found is _UNKNOWN or found is None:
            # What stands in for those with numbers is the same for torch as long as it is held.
            shapes = [self.from_tensor(tensor) for tensor in numbered] if found is _UNKNOWN else []
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if found is _UNKNOWN:
                found = _found(out, (*given, *shapes))
                # Who is given a tensor with numbers, and returns it, returns what stands in for it.
                _results[whole] = None if numbered and _returns_given(found) else found
            return out
        if type(found) is list:
            return tuple(self._make(one, given) for one in found)
        return self._make(found, given)

    def _is_plain(self, value: Any) -> bool:
        return type(value) is FakeTensor and value.fake_mode is self and value.constant is None

    def _describe(self, values: Iterable[Any], key: list[Any], numbered: list[Tensor]) -> bool:
        """Add to a key what results depend on, and to others the tensors with numbers; whether that is all."""
        for value in values:
            if type(value) is FakeTensor:
                if value.fake_mode is not self or value.constant is not None or value.layout is not torch.strided:
                    return False
                key += (value.shape, value.stride(), value.dtype, value.fake_device)
            elif isinstance(value, (list, tuple)):
                key += (type(value), len(value))
                if not self._describe(value, key, numbered):
                    return False
            elif type(value) is Tensor and value.layout is torch.strided:
                numbered.append(value)
                key += (Tensor, value.shape, value.stride(), value.dtype, value.device)
            elif isinstance(value, torch.Generator):  # of numbers alone
                key.append(torch.Generator)
            elif isinstance(value, (Tensor, torch.ScriptObject)):
                return False
            else:  # 1 and 1.0 are equal, but do not make the same
                key += (type(value), value)
        return True

    def _make(self, found: Any, given: tuple[Any, ...]) -> Any:
        if type(found) is int:
            return given[found]
        if found == ():
            return None
        with in_kernel_invocation_manager(self):
            made = torch.empty_strided(found.shape, found.stride, dtype=found.dtype, device=_META)
        return FakeTensor(self, made, found.device)


def asked_device(func: Any, args: Sequence[Any]) -> torch.device | None:
    """The device of a tensor, which torch asks for several times with every operator; None if that is not asked."""
    if func is not _DEVICE or type(args[0]) is not FakeTensor:
        return None
    tensor = args[0]
    return _META if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


@functools.cache
def _way(func: Any) -> str:
    """How the results of an operator are found: a view's by its kernel, and others are remembered or asked for.

    What marks a part of a profile has nothing to do with tensors.
    """
    if not isinstance(func, torch._ops.OpOverload) or any(tag in func.tags for tag in _UNCERTAIN):
        return "asked"
    if func.is_view:
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
        return "asked" if composite else "view"
    if func.namespace == "profiler":
        return "run"
    schema = func._schema
    tensors = any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))
    return "remembered" if tensors and func.namespace in ("aten", "prims", "_c10d_functional") else "asked"


def _found(out: Any, given: tuple[Any, ...]) -> Any:
    """What is remembered of a result: None if torch is to be asked again."""
    if isinstance(out, tuple):
        each = [_found(value, given) for value in out]
        return None if None in each else each
    if out is None:
        return ()
    for number, value in enumerate(given):
        if out is value:
            return number
    if type(out) is not FakeTensor or out.constant is not None or out.layout is not torch.strided:
        return None
    reached = 1 + sum((size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True))
    size = reached * out.element_size() if out.numel() else 0
    # A tensor in the storage of another, or in one that is larger than it, is not made from a shape.
    if out.storage_offset() or out.untyped_storage().nbytes() != size or _shares(out, given):
        return None
    return _Made(out.shape, out.stride(), out.dtype, out.fake_device)


def _returns_given(found: Any) -> bool:
    """Whether an argument is among results."""
    return any(type(one) is int for one in (found if type(found) is list else [found]))


def _shares(out: Tensor, values: Iterable[Any]) -> bool:
    place = out.untyped_storage()._cdata
    return any(
        _shares(out, value)
        if isinstance(value, (list, tuple))
        else isinstance(value, Tensor) and value.untyped_storage()._cdata == place
        for value in values
    )
