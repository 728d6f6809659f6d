"""Reads the tensors of a checkpoint into those of a model, whatever layouts wrote the one and hold the other."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.errors import DamagedCheckpointError, DamagedFileError, UserError
from parallel.manifest import Manifest
from parallel.stored.distributed_files import LARGE, METADATA, Block, BlockedTensor, Sizes, read_block, read_metadata
from parallel.stored.file_range import FileRange


@torch.no_grad()
def load_tensors(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors in place from a checkpoint, whatever layout wrote it.

    Nothing in the checkpoint is run: its pickles are read by :mod:`parallel.stored`, not by torch.

    Args:
        path: a checkpoint directory.
        tensors: global name -> tensor (a DTensor where it is sharded) to fill; the checkpoint may hold more.
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
    found = [mine]
    if group is not None:
        found *= dist.get_world_size(group)
        dist.all_gather_object(found, mine, group=group)
    if failure is not None and not known:
        raise failure
    faults, reasons = ("; ".join(dict.fromkeys(filter(None, texts))) for texts in zip(*found, strict=True))
    if faults:
        raise DamagedCheckpointError(path, faults) from None
    if reasons:
        raise UserError(reasons) from None


def _fill(path: Path, tensors: dict[str, Tensor]) -> None:
    manifest = Manifest.read(path)
    if manifest is not None:
        manifest.check_files()
        manifest.check_range(METADATA)
    stored = read_metadata(FileRange.whole(path / METADATA), LARGE)
    parts: dict[str, _Part] = {}
    wanted: dict[str, list[tuple[Block, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"checkpoint {path} holds no tensor {name}: it was saved from another kind of model")
        entry = stored[name]
        if entry.shape != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {path} holds {name} in shape {entry.shape}, but the model settings make it "
                f"{tuple(tensor.shape)}: use the settings it was saved with"
            )
        if entry.dtype.is_floating_point != tensor.dtype.is_floating_point or entry.dtype.is_complex:
            raise UserError(
                f"checkpoint {path} holds {name} as {entry.dtype}, but the model has it as {tensor.dtype}: it was "
                "saved from another kind of model"
            )
        parts[name] = _local_part(tensor)
        for block in entry.blocks:
            if block.within(*parts[name].region) is not None:
                wanted[block.file].append((block, name))
    for file, blocks in wanted.items():
        with FileRange.whole(path / file).opened() as place:
            for block, name in sorted(blocks, key=lambda item: item[0].start):
                if manifest is not None:
                    manifest.check_range(file, block.start, block.length)
                parts[name].fill(place, stored[name], block)


@dataclass(frozen=True)
class _Part:
    """What this process has of a tensor.

    Attributes:
        values: to fill.
        region: offsets and sizes of it in the whole tensor.
    """

    values: Tensor
    region: tuple[Sizes, Sizes]

    def fill(self, place: FileRange, tensor: BlockedTensor, block: Block) -> None:
        """Copy what a block has of the region."""
        shared = block.within(*self.region)
        assert shared is not None
        first, sizes = shared
        inside = tuple(a - b for a, b in zip(first, block.offsets))
        values = read_block(place.part(block.start, block.length), tensor, block, inside, sizes)
        self.values[tuple(slice(a - b, a - b + n) for a, b, n in zip(first, self.region[0], sizes))].copy_(values)


def _local_part(tensor: Tensor) -> _Part:
    if not isinstance(tensor, DTensor):
        return _Part(tensor, ((0,) * tensor.dim(), tuple(tensor.shape)))
    # Where the block of this process lies, by the method that torch.distributed.checkpoint asks as well.
    (chunk,) = tensor.__create_chunk_list__()
    return _Part(tensor.to_local(), (tuple(chunk.offsets), tuple(chunk.sizes)))
