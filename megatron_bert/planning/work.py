# SPDX-License-Identifier: Apache-2.0
"""Operations that a rank carries out in a step: those of matrix products and attention, recomputation included."""

from __future__ import annotations

from megatron_bert.planning.layouts import Layout, Stage
from megatron_bert.planning.workload import Workload


def layer_flops(workload: Workload, layout: Layout) -> tuple[int, int]:
    """Of a layer and micro batch on one rank, forward and backward.

    A backward pass has twice the products of the forward pass. That of fused attention, or with selective recomputation
    of one that is written out, computes the scores again: five products for the two of the forward pass.
    """
    config, tensor = workload.config, layout.tensor
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens)
    hidden, wide = config.hidden_size, config.intermediate_size // tensor
    products = 2 * tokens * (4 * hidden * (hidden // tensor) + 2 * hidden * wide)
    attended = workload.attended_tokens(layout.micro_batch, layout.split_tokens)
    attention = 4 * attended * workload.length * (hidden // tensor)
    again = not workload.writes_scores or layout.recompute == "selective"
    forward, backward = products + attention, 2 * products + attention * (5 if again else 4) // 2
    # Nothing needs the last product of a region again, but a split backward pass gets its operands behind it only.
    last = 2 * tokens * wide * hidden
    if layout.recompute == "full":
        backward += forward - (0 if layout.splits_backward else last)
    elif layout.recompute == "selective" and layout.splits_backward:
        backward += last
    return forward, backward


def head_flops(workload: Workload, layout: Layout) -> int:
    """Of the forward pass of the heads for a micro batch on one rank; those of a hidden size are on every one."""
    config = workload.config
    hidden, slots = config.hidden_size, layout.micro_batch * workload.slots
    masked = 2 * slots * hidden * (hidden + config.padded_vocab_size // layout.tensor)
    if workload.head is not None:
        head = workload.head
        return 2 * layout.micro_batch * head.rows * hidden * (hidden * head.pooled + head.outputs)
    pairs = layout.micro_batch * workload.pairs * (2 * hidden * hidden + 4 * hidden) if config.binary_head else 0
    return masked + pairs


def rank_flops(workload: Workload, layout: Layout, stages: list[Stage], rank: int = 0) -> int:
    """Of a step on one rank of the pipeline."""
    each = sum(layer_flops(workload, layout))
    total = 0
    for number in layout.stages_of(rank):
        part = stages[number].part
        total += len(part.layers) * each + (3 * head_flops(workload, layout) if part.last else 0)
    return layout.microbatches(workload) * total
