# SPDX-License-Identifier: Apache-2.0
"""How large a checkpoint is and who writes it, in closed form."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

#: What ``.metadata`` takes for a block, about: its name, place, shape, file, offset and length.
METADATA_BYTES = 250


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint.

    Attributes:
        nbytes: of the whole tensor: 4 for each value in float32.
        shards: into how many blocks ranks divide it: over the tensor axis where its layer is divided, times the data
            axis where its sharding is.
        stage: the pipeline rank that has it.
    """

    nbytes: int
    shards: int = 1
    stage: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """A checkpoint before it is written.

    Attributes:
        files: of tensors, one a rank that writes any.
        value_bytes: of all tensors, each once, however many ranks hold copies.
        blocks: places of the files that hold a block of a tensor; entries of ``.metadata``.
        metadata_bytes: of ``.metadata``, about.
        rank_bytes: values that the rank with the most writes, at most.
    """

    files: int
    value_bytes: int
    blocks: int
    metadata_bytes: int
    rank_bytes: int


def plan_checkpoint(tensors: Iterable[SavedTensor], ranks: int, stages: int) -> CheckpointPlan:
    """What a checkpoint takes.

    A block goes to one of the ranks that hold it, the one with the least to write. With ``S`` the values of a stage,
    ``r`` its ranks and ``b`` its largest block, a rank writes at most ``S / r + b``, and no more than ``S``, where
    every block can go to any of the stage's ranks or the blocks are divided evenly over them; copies over the data axis
    alone keep to that, too.

    Args:
        tensors: of the checkpoint: weights and moments.
        stages: pipeline ranks.
    """
    by_stage: dict[int, list[SavedTensor]] = defaultdict(list)
    for tensor in tensors:
        by_stage[tensor.stage].append(tensor)
    each = ranks // stages
    blocks = sum(tensor.shards for found in by_stage.values() for tensor in found)
    most = 0
    for found in by_stage.values():
        largest = max(math.ceil(tensor.nbytes / tensor.shards) for tensor in found)
        whole = sum(tensor.nbytes for tensor in found)
        most = max(most, min(whole, math.ceil(whole / each) + largest))
    return CheckpointPlan(
        files=sum(min(each, sum(tensor.shards for tensor in found)) for found in by_stage.values()),
        value_bytes=sum(tensor.nbytes for found in by_stage.values() for tensor in found),
        blocks=blocks,
        metadata_bytes=blocks * METADATA_BYTES,
        rank_bytes=most,
    )
