# SPDX-License-Identifier: Apache-2.0
"""Plans as files: safetensors, with everything that is not a tensor as JSON in its header.

A file holds no floating-point tensor. It says its own version, and a digest of all it holds, so that a damaged file
never gives wrong answers.
"""

from __future__ import annotations

import json
import types
import zlib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from megatron_bert.convert.integer_plans import FORMAT, HEADER_BYTES, PLAN_NAME, begins_as_plan
from megatron_bert.ibert.engine.plan import Plan
from parallel.errors import UserError, brief
from parallel.whole_files import write_bytes

__all__ = ["PLAN_NAME", "is_plan", "plan_bytes", "read_plan", "read_shapes", "write_plan"]

#: Versions of the file and of the arithmetic.
VERSION, ARITHMETIC = 1, 2
_Tensors = dict[str, Tensor]
_TYPES = {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as a file that is whole or not there."""
    write_bytes(Path(path), plan_bytes(plan))


def plan_bytes(plan: Plan, digest: bool = True) -> bytes:
    """The contents of a plan's file.

    Args:
        plan: to write.
        digest: with that of all it holds, as files have it.
    """
    tensors: _Tensors = {}
    tree = json.dumps(_flattened(plan, "", tensors), sort_keys=True)
    header = {"format": FORMAT, "version": str(VERSION), "arithmetic": str(ARITHMETIC), "plan": tree}
    if digest:
        header["digest"] = _digest(tree, tensors)
    return safetensors.torch.save(tensors, header)


def read_plan(path: str | Path) -> Plan:
    """Read a plan and check all of it.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = Path(path)
    tree, tensors, digest = _contents(path, values=True)
    if digest != _digest(tree, tensors):
        raise UserError(f"{path} is a damaged integer plan (its digest is another): write or fetch it again")
    return _plan(tree, tensors, path, checked=True)


def read_shapes(path: Path) -> Plan:
    """A plan whose tensors have a shape and no values, from a file that an engine has checked.

    Raises:
        UserError: see :func:`read_plan`.
    """
    tree, tensors, _ = _contents(path, values=False)
    return _plan(tree, tensors, path, checked=False)


def _contents(path: Path, *, values: bool) -> tuple[str, _Tensors, str]:
    """The plan's text, its tensors (without ``values`` on the meta device) and the digest that the file has."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            _check_header(header, path)
            names = file.keys()
            if values:
                tensors = {name: file.get_tensor(name) for name in names}
            else:
                slices = {name: file.get_slice(name) for name in names}
                tensors = {
                    name: torch.empty(each.get_shape(), dtype=_TYPES[each.get_dtype()], device="meta")
                    for name, each in slices.items()
                }
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is not there: give the plan of a quantized model") from None
        if path.is_dir():
            raise UserError(f"{path} is a directory, where a plan is a file: write it again") from None
        raise UserError(f"{path} is a damaged integer plan ({brief(error)}): write or fetch it again") from None
    return header["plan"], tensors, header["digest"]


def _plan(tree: str, tensors: _Tensors, path: Path, *, checked: bool) -> Plan:
    try:
        plan = _built(Plan, json.loads(tree), "", tensors)
        if tensors:
            raise ValueError(f"{min(tensors)} has no place in it")
        if checked:
            from megatron_bert.ibert.engine.plan_check import check_plan  # what an engine has checked needs none of it

            check_plan(plan)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not an integer plan ({brief(error)}): write it again") from None
    return plan


def is_plan(path: Path) -> bool:
    """Whether a file begins as a plan does, even where the rest of it is cut off or damaged."""
    try:
        with path.open("rb") as file:
            return begins_as_plan(file.read(HEADER_BYTES))
    except OSError:
        return False


def _check_header(header: dict[str, str], path: Path) -> None:
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is not an integer plan: give one that `megatron-bert quantize` has written")
    for name, known in (("version", VERSION), ("arithmetic", ARITHMETIC)):
        found = header.get(name, "")
        if found == str(known):
            continue
        newer = found.isdecimal() and int(found) > known
        remedy = "run it with a newer megatron-bert" if newer else "compile the quantized model again"
        raise UserError(f"{path} has {name} {found or 'none'}, this reads {known}: {remedy}")
    if "plan" not in header or "digest" not in header:
        raise UserError(f"{path} is a damaged integer plan (its header is cut): write or fetch it again")


def _digest(tree: str, tensors: _Tensors) -> str:
    """A checksum of all that a plan holds: CRC-32, as it costs a fifth of loading where SHA-256 takes most of it."""
    digest = zlib.crc32(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), digest)
        digest = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), digest)  # type: ignore[arg-type]
    return f"{digest:08x}"


# ---------------------------------------------------------------- dataclasses and JSON


def _flattened(value: Any, name: str, tensors: _Tensors) -> Any:
    """JSON of a plan's part; its tensors go into a dictionary by their place."""
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if is_dataclass(value):
        own = f"{name}." if name else ""
        return {
            field.name: _flattened(getattr(value, field.name), own + field.name, tensors) for field in fields(value)
        }
    if isinstance(value, tuple):
        return [_flattened(each, f"{name}.{place}", tensors) for place, each in enumerate(value)]
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a part's fields, for each of many layers."""
    return get_type_hints(kind)


def _built(kind: Any, tree: Any, name: str, tensors: _Tensors) -> Any:
    """The part of a plan that JSON describes, taking its tensors.

    Raises:
        ValueError: it does not fit.
    """
    if isinstance(kind, types.UnionType):  # something or None
        if tree is None:
            return None
        kind = next(each for each in get_args(kind) if each is not types.NoneType)
    if kind is Tensor:
        if tree != {"tensor": name} or name not in tensors:
            raise ValueError(f"{name} is missing")
        return tensors.pop(name)
    if is_dataclass(kind) and isinstance(kind, type):
        hints, own = _hints(kind), f"{name}." if name else ""
        if not isinstance(tree, dict) or tree.keys() != {field.name for field in fields(kind)}:
            raise ValueError(f"{name or 'the plan'} has other fields")
        return kind(**{each: _built(hints[each], tree[each], own + each, tensors) for each in tree})
    if get_origin(kind) is tuple:
        if not isinstance(tree, list):
            raise ValueError(f"{name} is not a list")
        return tuple(_built(get_args(kind)[0], each, f"{name}.{place}", tensors) for place, each in enumerate(tree))
    if get_origin(kind) is Literal:
        if tree not in get_args(kind):
            raise ValueError(f"{name} is {brief(tree)}")
        return tree
    wanted = get_origin(kind) or kind
    if not isinstance(tree, wanted) or isinstance(tree, bool):
        raise ValueError(f"{name} is {brief(tree)}")
    return tree
