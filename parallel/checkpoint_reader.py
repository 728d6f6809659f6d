# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a checkpoint into those of a model, whatever layouts wrote the one and hold the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import DamagedCheckpointError, DamagedFileError, UserError
from parallel.manifest import Manifest
from parallel.object_collectives import gather_objects
from parallel.parts import Part, Region
from parallel.stored.distributed_files import LARGE, METADATA, Block, BlockedTensor, read_block, read_metadata
from parallel.stored.file_range import FileRange


@torch.no_grad()
def load_tensors(path: Path, tensors: Mapping[str, Tensor | Part], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors in place from a checkpoint, whatever layout wrote it.

    Nothing in the checkpoint is run: its pickles are read by :mod:`parallel.stored`, not by torch.

    Args:
        tensors: global name -> tensor (a DTensor where it is sharded) or this rank's part of one, to fill; the
            checkpoint may hold more.
        group: a group with CPU collectives over all ranks, which then fail together; None to load in this process
            alone.

    Raises:
        DamagedCheckpointError: what is there is not what was saved, as any rank has found.
        UserError: the checkpoint lacks a tensor, or holds it in another shape.
    """
    failure: Exception | None = None
    try:
        _fill(path, tensors)
    except Exception as error:
        failure = error
    fault = failure.fault if isinstance(failure, DamagedFileError) else None
    known = failure is None or isinstance(failure, UserError)
    mine = (fault, str(failure or "") if known else f"loading {path} failed: {type(failure).__name__}: {failure}")
    found = [mine] if group is None else gather_objects(mine, group)
    if failure is not None and not known:
        raise failure
    faults, reasons = ("; ".join(dict.fromkeys(filter(None, texts))) for texts in zip(*found, strict=True))
    if faults:
        raise DamagedCheckpointError(path, faults) from None
    if reasons:
        raise UserError(reasons) from None


def _fill(path: Path, tensors: Mapping[str, Tensor | Part]) -> None:
    manifest = Manifest.read(path)
    if manifest is not None:
        manifest.check_files()
        manifest.check_range(METADATA)
    stored = read_metadata(FileRange.whole(path / METADATA), LARGE)
    regions: dict[str, list[_Region]] = {}
    wanted: dict[str, list[tuple[Block, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        part = Part.of(tensor)
        if name not in stored:
            raise UserError(f"checkpoint {path} holds no tensor {name}: it was saved from another kind of model")
        entry = stored[name]
        if entry.shape != part.shape:
            raise UserError(
                f"checkpoint {path} holds {name} in shape {entry.shape}, but the model settings make it "
                f"{part.shape}: use the settings it was saved with"
            )
        if entry.dtype.is_floating_point != part.dtype.is_floating_point or entry.dtype.is_complex:
            raise UserError(
                f"checkpoint {path} holds {name} as {entry.dtype}, but the model has it as {part.dtype}: it was "
                "saved from another kind of model"
            )
        regions[name] = [_Region(values, region) for region, values in part.blocks()]
        for block in entry.blocks:
            if any(block.within(*own.region) is not None for own in regions[name]):
                wanted[block.file].append((block, name))
    for file, blocks in wanted.items():
        with FileRange.whole(path / file).opened() as place:
            for block, name in sorted(blocks, key=lambda item: item[0].start):
                if manifest is not None:
                    manifest.check_range(file, block.start, block.length)
                for own in regions[name]:
                    own.fill(place, stored[name], block)


@dataclass(frozen=True)
class _Region:
    """A block of a tensor that this process has.

    Attributes:
        values: to fill.
        region: offsets and sizes of it in the whole tensor.
    """

    values: Tensor
    region: Region

    def fill(self, place: FileRange, tensor: BlockedTensor, block: Block) -> None:
        """Copy what a stored block has of the region, if anything."""
        shared = block.within(*self.region)
        if shared is None:
            return
        first, sizes = shared
        inside = tuple(a - b for a, b in zip(first, block.offsets))
        values = read_block(place.part(block.start, block.length), tensor, block, inside, sizes)
        self.values[tuple(slice(a - b, a - b + n) for a, b, n in zip(first, self.region[0], sizes))].copy_(values)
