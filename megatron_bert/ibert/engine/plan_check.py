# SPDX-License-Identifier: Apache-2.0
"""What must hold of a plan for an engine to run it: types, shapes and ranges of every number.

An engine's kernels trust these, so a file that was changed can give wrong answers at most, and never read or write
where it must not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bert.ibert.bounds import HEAD_DIMENSIONS, LARGEST_ROW, MOST_PRODUCTS
from megatron_bert.ibert.engine.plan import (
    Dense,
    Embeddings,
    Gelu,
    Layer,
    MaskedLanguage,
    Matrix,
    Norm,
    Plan,
    Pooler,
    Read8,
    Rescale,
    Wide,
    plan_heads,
)
from megatron_bert.ibert.gelu import EXPONENTS
from megatron_bert.model.task_heads.table import HEADS

_SHORT = 2**15 - 1
_LIMITS = (63, 127)


def check_plan(plan: Plan) -> None:
    """Check all of it.

    Raises:
        ValueError: something is not as it must be; says what.
    """
    embeddings = plan.embeddings
    _require(embeddings.word.dim() == 2, "embeddings.word has no rows")
    hidden = plan.hidden_size
    _require(0 < hidden <= LARGEST_ROW >> 15, "the hidden size is out of range")
    _check_embeddings(embeddings, hidden)
    _within(plan.hidden_exponent, -20, 20, "hidden_exponent")
    _require(bool(plan.layers), "there are no layers")
    post = plan.layers[0].post_norm
    _require(post == (embeddings.norm is not None) == (plan.final_norm is None), "norms are before and after sums")
    for number, layer in enumerate(plan.layers):
        _require(layer.post_norm == post == (layer.read_mlp is not None), f"layer {number} has its norms elsewhere")
        _check_layer(layer, hidden, f"layers.{number}")
    if plan.final_norm is not None:
        _check_norm(plan.final_norm, hidden, _SHORT, "final_norm")
    _check_heads(plan, hidden)


def _require(held: bool, what: str) -> None:
    if not held:
        raise ValueError(what)


def _within(value: int, low: int, high: int, name: str) -> None:
    _require(low <= value <= high, f"{name} is {value}")


def _tensor(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str, low: int, high: int) -> None:
    _require(tensor.dtype == dtype and tensor.shape == shape, f"{name} has another type or shape")
    _require(tensor.is_contiguous(), f"{name} is not contiguous")
    least, most = tensor.aminmax()
    _require(low <= int(least) and int(most) <= high, f"{name} has numbers out of range")


def _check_matrix(matrix: Matrix, columns: int, name: str, rows: int | None = None) -> int:
    """Check a matrix; its number of rows."""
    count = matrix.weight.shape[0] if rows is None and matrix.weight.dim() else rows or 0
    _require(count > 0, f"{name} has no rows")
    _require(columns <= MOST_PRODUCTS, f"{name} has too many columns")
    _tensor(matrix.weight, torch.int8, (count, columns), f"{name}.weight", -127, 127)
    _tensor(matrix.bias, torch.int32, (count,), f"{name}.bias", -(2**27), 2**27)
    return count


def _check_rescale(rescale: Rescale, rows: int, name: str) -> None:
    _tensor(rescale.shift, torch.int8, (rows,), f"{name}.shift", -15, 30)
    _tensor(rescale.multiplier, torch.int16, (rows,), f"{name}.multiplier", 0, _SHORT)


def _check_wide(wide: Wide, rows: int, name: str) -> None:
    _tensor(wide.shift, torch.int8, (rows,), f"{name}.shift", 1, 52)
    _tensor(wide.multiplier, torch.int32, (rows,), f"{name}.multiplier", 0, 2**23)


def _check_read8(read: Read8, name: str) -> None:
    _within(read.shift, -60, 60, f"{name}.shift")
    _within(read.multiplier, 0, _SHORT, f"{name}.multiplier")
    _require(read.limit in _LIMITS, f"{name}.limit is {read.limit}")


def _check_norm(norm: Norm, columns: int, most: int, name: str) -> None:
    _within(norm.read, -40, 40, f"{name}.read")
    _within(norm.read_limit, 1, _SHORT, f"{name}.read_limit")
    _tensor(norm.gain, torch.int16, (columns,), f"{name}.gain", -_SHORT, _SHORT)
    _tensor(norm.offset, torch.int32, (columns,), f"{name}.offset", -(2**30), 2**30)
    _within(norm.shift, 1, 24, f"{name}.shift")
    _within(norm.epsilon, 0, 2**60, f"{name}.epsilon")
    _within(norm.limit, 1, most, f"{name}.limit")


def _check_embeddings(embeddings: Embeddings, hidden: int) -> None:
    rows = embeddings.word.shape[0]
    _require(rows > 0, "embeddings.word has no rows")
    _tensor(embeddings.word, torch.int8, (rows, hidden), "embeddings.word", -127, 127)
    _check_rescale(embeddings.word_rescale, rows, "embeddings.word_rescale")
    for name, table in (("position", embeddings.position), ("token_type", embeddings.token_type)):
        _require(table.dim() == 2 and table.shape[0] > 0, f"embeddings.{name} has no rows")
        _tensor(table, torch.int16, (table.shape[0], hidden), f"embeddings.{name}", -_SHORT, _SHORT)
    _within(embeddings.first_position, 0, embeddings.position.shape[0] - 1, "embeddings.first_position")
    _within(embeddings.limit, 1, _SHORT, "embeddings.limit")
    if embeddings.norm is not None:
        _check_norm(embeddings.norm, hidden, _SHORT, "embeddings.norm")


def _check_gelu(gelu: Gelu, name: str) -> None:
    _require(gelu.exponent in EXPONENTS, f"{name}.exponent is {gelu.exponent}")
    _within(gelu.multiplier, 0, _SHORT, f"{name}.multiplier")
    _require(gelu.top in (127, 255), f"{name}.top is {gelu.top}")
    _within(gelu.zero_point, 0, gelu.top, f"{name}.zero_point")


def _check_layer(layer: Layer, hidden: int, name: str) -> None:
    attention = layer.attention
    _require(attention.heads > 0 and hidden % attention.heads == 0, f"{name} has {attention.heads} heads")
    _within(hidden // attention.heads, 1, HEAD_DIMENSIONS, f"the head dimension of {name}")
    _require(attention.limit in _LIMITS and attention.context_limit in _LIMITS, f"{name}.attention has other limits")
    _within(attention.score_shift, -16, 31, f"{name}.attention.score_shift")
    _within(attention.score_multiplier, 0, 2**16 - 1, f"{name}.attention.score_multiplier")
    _within(attention.mean_multiplier, 0, _SHORT, f"{name}.attention.mean_multiplier")
    _within(attention.mean_exponent, -60, 60, f"{name}.attention.mean_exponent")
    to_norm = _SHORT if layer.post_norm else 127
    for part, read, norm in (
        ("attention", layer.read_attention, layer.attention_norm),
        ("mlp", layer.read_mlp, layer.mlp_norm),
    ):
        if read is not None:
            _check_read8(read, f"{name}.read_{part}")
        _check_norm(norm, hidden, to_norm, f"{name}.{part}_norm")
    inner = layer.intermediate.weight.shape[0]
    for part, matrix, rescale, rows, columns in (
        ("query_key_value", layer.query_key_value, layer.query_key_value_rescale, 3 * hidden, hidden),
        ("attention_output", layer.attention_output, layer.attention_output_rescale, hidden, hidden),
        ("intermediate", layer.intermediate, layer.intermediate_rescale, inner, hidden),
        ("output", layer.output, layer.output_rescale, hidden, inner),
    ):
        _check_matrix(matrix, columns, f"{name}.{part}", rows)
        _check_rescale(rescale, rows, f"{name}.{part}_rescale")
    _check_gelu(layer.gelu, f"{name}.gelu")
    for part, shift, limit in (
        ("attention", layer.attention_read, layer.attention_limit),
        ("output", layer.output_read, layer.output_limit),
    ):
        _within(shift, -40, 40, f"{name}.{part}_read")
        _within(limit, 1, _SHORT, f"{name}.{part}_limit")


def _check_heads(plan: Plan, hidden: int) -> None:
    heads = plan.heads
    there = set(heads.present)
    allowed = plan_heads(plan.task)
    fits = allowed.needed <= there <= allowed.needed | allowed.more
    _require(fits, f"the heads of a {plan.task} model are {sorted(there)}")
    if heads.pooler is not None:
        _check_pooler(heads.pooler, hidden)
    for name, head in (("classifier", heads.classifier), ("pair", heads.pair)):
        if head is not None:
            _check_dense(head, hidden, f"heads.{name}")
    outputs = HEADS[plan.task].outputs if plan.task in HEADS else None
    if outputs is not None:
        assert heads.classifier is not None
        _require(len(heads.classifier.matrix.bias) == outputs, f"heads.classifier has not {outputs} rows")
    if heads.masked is not None:
        _check_masked(heads.masked, hidden, plan.embeddings.word.shape[0])


def _check_pooler(pooler: Pooler, hidden: int) -> None:
    _check_read8(pooler.read, "heads.pooler.read")
    _check_matrix(pooler.matrix, hidden, "heads.pooler", hidden)
    _check_rescale(pooler.rescale, hidden, "heads.pooler.rescale")


def _check_dense(head: Dense, hidden: int, name: str) -> None:
    _check_read8(head.read, f"{name}.read")
    _check_wide(head.wide, _check_matrix(head.matrix, hidden, name), f"{name}.wide")


def _check_masked(head: MaskedLanguage, hidden: int, words: int) -> None:
    name = "heads.masked"
    _check_read8(head.read, f"{name}.read")
    _check_matrix(head.dense, hidden, f"{name}.dense", hidden)
    _check_rescale(head.rescale, hidden, f"{name}.rescale")
    _require(head.exponent in EXPONENTS, f"{name}.exponent is {head.exponent}")
    _within(head.gelu_read, -40, 40, f"{name}.gelu_read")
    _within(head.gelu_limit, 1, _SHORT, f"{name}.gelu_limit")
    _check_norm(head.norm, hidden, 127, f"{name}.norm")
    if head.decoder is not None:
        _tensor(head.decoder, torch.int8, (words, hidden), f"{name}.decoder", -127, 127)
    _tensor(head.bias, torch.int32, (words,), f"{name}.bias", -(2**27), 2**27)
    _check_wide(head.wide, words, f"{name}.wide")
