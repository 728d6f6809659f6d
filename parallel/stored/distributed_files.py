# SPDX-License-Identifier: Apache-2.0
"""Directories of torch.distributed.checkpoint: what they hold and where, read without running them.

Torch's own reader loads ``.metadata`` with an unrestricted pickle. The format is small: that pickle says where the
blocks of every tensor lie, and each block is what ``torch.save`` writes, at an offset of a file beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.errors import DamagedFileError, UserError, brief
from parallel.stored.file_range import FileRange
from parallel.stored.pickles import PLAIN, Limits, load_pickle
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.torch_files import load_torch_file
from parallel.stored.torch_vocabulary import DTYPE_VALUES
from parallel.stored.vocabulary import StandIn, Vocabulary

METADATA = ".metadata"
#: For directories on disk, whose pickles are as large as their files: a block takes some 70 opcodes and 2 kB.
LARGE = Limits(opcodes=200_000_000, memory=4 << 30)

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a tensor, as a file holds it.

    Attributes:
        offsets, sizes: of the block in the tensor.
        file: name of the file, in the directory of the metadata.
        start, length: of its bytes there.
    """

    offsets: Sizes
    sizes: Sizes
    file: str
    start: int
    length: int

    def within(self, offsets: Sizes, sizes: Sizes) -> tuple[Sizes, Sizes] | None:
        """Offsets and sizes, in the whole tensor, of what the block has of a region; None for nothing."""
        first = tuple(map(max, self.offsets, offsets))
        ends = (min(o + s, p + t) for o, s, p, t in zip(self.offsets, self.sizes, offsets, sizes, strict=True))
        shared = tuple(end - start for start, end in zip(first, ends))
        return (first, shared) if all(size > 0 for size in shared) else None


@dataclass(frozen=True, slots=True)
class BlockedTensor:
    """A tensor in blocks, which fill it without gaps and without overlapping; those without elements are left out."""

    name: str
    shape: Sizes
    dtype: torch.dtype
    blocks: tuple[Block, ...]


def read_metadata(place: FileRange, limits: Limits = PLAIN) -> dict[str, BlockedTensor]:
    """The tensors of a directory by name, from its file ``.metadata``; what it holds besides is left out.

    Raises:
        UserError: the file is damaged, asks to load something else than data, or speaks of blocks that do not make up
            their tensors or of files elsewhere.
    """
    vocabulary = Vocabulary(
        values=DTYPE_VALUES,
        calls={"torch.Size": lambda sizes=(): tuple(sizes)},
        inert=("torch.distributed.checkpoint.", "torch.serialization._get_layout", "pathlib."),
    )
    with place.open() as file:
        root = load_pickle(file, vocabulary, place.label, limits)
    try:
        places = {}
        for index, info in _attribute(root, "storage_data").items():
            if isinstance(index, StandIn) and isinstance(info, StandIn):
                places[index.state["fqn"], index.state.get("offset")] = info.state
        return {
            name: _tensor(name, entry.state, places, place.label)
            for name, entry in _attribute(root, "state_dict_metadata").items()
            if isinstance(name, str) and entry.kind.name == "TensorStorageMetadata"
        }
    except UserError:
        raise
    # Values of any kind can stand anywhere in a damaged file.
    except Exception as error:
        raise DamagedFileError(f"{place.label} is damaged ({type(error).__name__})", "use another checkpoint") from None


def _attribute(value: Any, name: str) -> dict[Any, Any]:
    found = value.state[name]
    if not isinstance(found, dict):
        raise TypeError(name)
    return found


def _tensor(name: str, state: Any, places: Mapping[Any, Any], label: str) -> BlockedTensor:
    shape, dtype = _sizes(state["size"]), state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("dtype")
    blocks = []
    for entry in state["chunks"]:
        offsets, sizes = _sizes(entry.state["offsets"]), _sizes(entry.state["sizes"])
        if len(offsets) != len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError("a block outside its tensor")
        if 0 in sizes:
            continue  # of a rank that has nothing of the tensor
        info = places[name, offsets]
        file, start, length = info["relative_path"], info["offset"], info["length"]
        if not _names_a_file(file):
            raise DamagedFileError(
                f"{label} names {brief(file)}, which is not a file beside it, for {brief(name)}: it may be harmful",
                "use a checkpoint from a source that you trust",
            )
        if info.get("transform_descriptors"):
            raise DamagedFileError(f"{label} says that {brief(name)} is compressed", "save it without extensions")
        if type(start) is not int or type(length) is not int or length < math.prod(sizes) * dtype.itemsize:
            raise ValueError("a block larger than its bytes")
        blocks.append(Block(offsets, sizes, file, start, length))
    _check_tiling(name, shape, blocks, label)
    return BlockedTensor(name, shape, dtype, tuple(blocks))


def _names_a_file(name: Any) -> bool:
    named = isinstance(name, str) and name.isprintable() and re.fullmatch(r"[^/]{1,255}", name) is not None
    return named and name not in (".", "..")


def _sizes(value: Any) -> Sizes:
    if not isinstance(value, tuple) or len(value) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise ValueError("sizes")
    return value


def _check_tiling(name: str, shape: Sizes, blocks: list[Block], label: str) -> None:
    """The blocks make up the tensor, each element once."""
    count: int = math.prod(shape)
    if count == 0:
        return
    volume = sum(math.prod(block.sizes) for block in blocks)
    if volume < count:
        raise DamagedFileError(
            f"{label} speaks of only a part of {brief(name)}: the checkpoint was not written to its end",
            "use another checkpoint",
        )
    if not covers([(block.offsets, block.sizes) for block in blocks], shape):
        raise ValueError("blocks that overlap")


def covers(blocks: Sequence[tuple[Sizes, Sizes]], shape: Sizes) -> bool:
    """Whether blocks, given by offsets and sizes, make up a tensor, each element once; empty ones do not count."""
    full = [block for block in blocks if 0 not in block[1]]
    volume = sum(math.prod(sizes) for _, sizes in full)
    return volume == math.prod(shape) and (volume == 0 or tile(full, shape))


def tile(blocks: list[tuple[Sizes, Sizes]], shape: Sizes) -> bool:
    """Whether blocks, given by offsets and sizes, cover a box and nothing twice: slab by slab between their edges."""
    if not shape:
        return len(blocks) == 1
    ahead = sorted(blocks, reverse=True)
    edges = sorted({edge for (first, *_), (size, *_) in blocks for edge in (first, first + size)})
    if not edges or (edges[0], edges[-1]) != (0, shape[0]):
        return False
    across: list[tuple[Sizes, Sizes]] = []
    for edge in edges[:-1]:
        across = [(offsets, sizes) for offsets, sizes in across if offsets[0] + sizes[0] > edge]
        while ahead and ahead[-1][0][0] == edge:
            across.append(ahead.pop())
        if not tile([(offsets[1:], sizes[1:]) for offsets, sizes in across], shape[1:]):
            return False
    return True


def read_block(place: FileRange, tensor: BlockedTensor, block: Block, offsets: Sizes, sizes: Sizes) -> Tensor:
    """Elements of a block of a tensor, on the CPU: the region of some offsets and sizes in the block.

    Raises:
        UserError: the file is damaged, asks to load something else than data, or holds another tensor there.
    """
    stored = load_torch_file(place)
    if not isinstance(stored, StoredTensor) or stored.shape != block.sizes or stored.dtype != tensor.dtype:
        raise DamagedFileError(f"{place.label} is damaged: a block of {brief(tensor.name)} is not what it should be")
    return stored.part(offsets, sizes).load()
