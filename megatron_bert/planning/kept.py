# SPDX-License-Identifier: Apache-2.0
"""Bytes that layers, heads and stages keep of a micro batch on one rank, in closed form.

Activations of a layer follow Korthikanti et al., arXiv 2205.05198, table 2, with fused attention: for T tokens on a
rank, h features and t tensor ranks in two-byte numbers ``T h (10 + 24 / t)``, or ``34 T h / t`` under sequence
parallelism, of which 2 are masks of dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_bert.planning.layouts import Layout, Stage
from megatron_bert.planning.workload import Workload


@dataclass(frozen=True)
class LayerTensors:
    """Bytes of the tensors of a layer for a micro batch, on one rank.

    Attributes:
        input: what it is called with.
        kept: what it keeps for its backward pass, the input included.
        repeated: what it keeps for as long as its own backward pass runs, when it is computed again.
        dropped: what its forward pass adds at its end.
        output, intermediate: what its backward pass adds at either product of the MLP, with its weight gradient.
        again: what computing it again adds where dropout draws its bits, as if what is repeated were there.
        queued: what a split backward pass leaves for the weight gradients.
    """

    input: float
    kept: float
    repeated: float
    dropped: float
    output: float
    intermediate: float
    again: float
    queued: float

    @property
    def transient(self) -> float:
        """What its backward pass adds at most."""
        return max(self.output, self.intermediate, self.again)


def layer_tensors(workload: Workload, layout: Layout) -> LayerTensors:
    """The tensors of one layer."""
    return _layer_tensors(
        workload, layout.tensor, layout.split_tokens, layout.micro_batch, layout.recompute, layout.splits_backward
    )


@lru_cache(maxsize=65536)
def _layer_tensors(
    workload: Workload, tensor: int, split_tokens: int, micro_batch: int, recompute: str, split: bool
) -> LayerTensors:
    config, number = workload.config, workload.number_bytes
    tokens = workload.tokens(micro_batch, split_tokens)
    own = tokens / split_tokens
    hidden, wide, heads = config.hidden_size, config.intermediate_size / tensor, config.num_attention_heads / tensor
    stream = number * hidden * own
    statistics = 8 * own
    mask = hidden * own if config.hidden_dropout_prob > 0 else 0.0
    # Weight gradients that wait for later take the gathered input with them.
    read = number * hidden * tokens if split else stream
    attention = number * 4 * hidden / tensor * tokens + 4 * heads * tokens
    attention += _scores(workload, tensor, tokens, recompute == "selective")
    mlp = number * wide * tokens * (2 if recompute == "none" else 1)
    kept = 2 * (stream + statistics + read + mask) + attention + mlp
    whole, activated, product = number * hidden * tokens, number * wide * tokens, number * wide * hidden
    bits = 8 * hidden * own if mask else 0.0  # of dropout, in two tensors of int32
    repeated = {"none": 0.0, "selective": activated, "full": kept + activated - stream - 2 * mask}[recompute]
    # The gradient of the residual stream, and that of the part added to it: gathered, or what dropout leaves.
    added = stream + (whole if split_tokens > 1 or mask else 0.0)
    # A split backward pass makes no gradients of weights, but keeps the activation, whose product is through, for them.
    output = added + activated + (activated if split else product)
    # Sums over tensor ranks are other tensors than what is summed. Behind them, the input is gathered once more.
    summed = whole if tensor == 1 else whole + stream
    intermediate = summed + (added if split else stream + product - activated)
    if split_tokens > 1 and not split:
        intermediate += whole
    if recompute != "full":
        output, intermediate = output - mask, intermediate - mask
    queued = 0.0
    if split:
        inputs = 2 * hidden + hidden / tensor + wide
        gradients = 3 * hidden / tensor + 2 * hidden + wide
        queued = number * tokens * (inputs + gradients)
    if recompute == "full":
        keys = 8 * tokens if mask else 0
        again = added + read + statistics + attention + max(stream + bits, summed if tensor > 1 else 0.0) - repeated
        dropped = stream + max(stream + bits, 2 * activated + whole)
        return LayerTensors(stream, stream + keys, repeated, dropped, output, intermediate, again, queued)
    return LayerTensors(stream, kept, repeated, stream + bits - mask, output, intermediate, 0.0, queued)


def _scores(workload: Workload, tensor: int, tokens: float, selective: bool) -> float:
    """Where attention is not fused: softmax in float32 and what dropout leaves of it, and where samples share rows."""
    number, dropout = workload.number_bytes, workload.config.attention_probs_dropout_prob > 0
    if workload.fused_attention and workload.rows and number == 4:
        # No kernel takes packed sequences in float32: rows are put in order, and given a mask.
        return number * tokens * (4 * workload.config.hidden_size / tensor + workload.length)
    if selective or not workload.writes_scores:
        return 0.0
    return workload.config.num_attention_heads / tensor * workload.length * tokens * (4 + number + dropout)


class HeadTensors(NamedTuple):
    """Bytes of the heads and their losses for a micro batch.

    Attributes:
        kept: from the forward to the backward pass, but for the next.
        logits: kept of what is as wide as the vocabulary.
        transient: what the backward pass of the loss adds.
        queued: what a split backward pass leaves for the weight gradients.
    """

    kept: float
    logits: float
    transient: float
    queued: float


def head_tensors(workload: Workload, layout: Layout) -> HeadTensors:
    """The tensors of the heads: the logits of masked tokens in float32, and two gradients of their size."""
    config, number = workload.config, workload.number_bytes
    slots = layout.micro_batch * workload.slots
    columns = min(config.vocab_size, config.padded_vocab_size // layout.tensor)
    rows = (4 * slots + 2 * layout.micro_batch * workload.pairs) * config.hidden_size * number
    if workload.head is not None:
        rows = (2 + 2 * workload.head.pooled) * layout.micro_batch * workload.head.rows * config.hidden_size * number
    queued = number * slots * (columns + 2 * config.hidden_size) if layout.splits_backward else 0.0
    logits, transient = 4.0 * slots * columns, 8.0 * slots * columns
    if workload.pretraining and not layout.splits_backward:  # logits have gone when the gradient of the words is made
        transient = max(transient, number * slots * columns + _word_gradient(workload, layout) - logits)
    return HeadTensors(rows, logits, transient, queued)


def _word_gradient(workload: Workload, layout: Layout) -> float:
    """Bytes of a gradient of the word embeddings, before it gets to flat buffers; data ranks count theirs elsewhere."""
    if not layout.flat:
        return 0.0
    config = workload.config
    return workload.number_bytes * config.hidden_size * config.padded_vocab_size / layout.tensor


class Kept(NamedTuple):
    """Bytes that a stage keeps of a micro batch.

    Attributes:
        held: from the forward to the backward pass, logits aside.
        queued: from a split backward pass to the weight gradients.
        grown: more than both, while a split backward pass goes down the stage: layers drop what they kept and queue
            what is left for later.
        table: while it goes down the stage: the gradient of word embeddings that embeddings have yet to add theirs to.
        ended: at the end of a backward pass, in place of what was held: gradients of embeddings, and what is queued.
    """

    held: float
    queued: float
    grown: float
    table: float
    ended: float


def kept_by_stage(workload: Workload, layout: Layout, stages: list[Stage]) -> dict[int, Kept]:
    """What stages keep, by their number."""
    layer, head = layer_tensors(workload, layout), head_tensors(workload, layout)
    tokens = workload.tokens(layout.micro_batch, layout.split_tokens)
    mask = tokens / layout.split_tokens * workload.config.hidden_size * (workload.config.hidden_dropout_prob > 0)
    whole = workload.number_bytes * tokens * workload.config.hidden_size
    found = {}
    for stage in stages:
        count, last = len(stage.part.layers), stage.part.last
        held = count * layer.kept + (mask if stage.part.first else 0.0)
        held += head.kept + final_norm(workload, layer) if last else 0.0
        queued = count * layer.queued + (head.queued if last else 0.0)
        grown = (count - 1) * max(0.0, layer.queued - layer.kept)
        # Of both ends of the model on one stage, gradients of the words are added up before they get to flat buffers.
        both = stage.part.first and last and workload.pretraining and layout.flat
        rows = _word_gradient(workload, layout)
        ended = 0.0
        if stage.part.first:
            ended = queued + max(2 * whole if layout.tensor > 1 else whole, whole + rows, 2 * rows * both) + rows * both
        found[stage.number] = Kept(held, queued, grown, rows * both, ended)
    return found


def final_norm(workload: Workload, layer: LayerTensors) -> float:
    """Bytes of the input of the norm after the last layer."""
    return layer.input if workload.config.layer_norm_placement == "pre" else 0.0
