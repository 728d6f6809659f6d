# SPDX-License-Identifier: Apache-2.0
"""How Megatron divides tensors over tensor-parallel ranks and layers over pipeline stages, and orders rows in them.

Megatron changed the order twice, and a wrong reading gives no error of shape, only a model that has unlearned. For A
heads of D dimensions (those of one tensor-parallel rank) the rows of the weight, and the elements of the bias, are

============  =============  ==========================================
version       order          note
============  =============  ==========================================
absent, 0     [3, A, D]      until September 2020, the NGC checkpoints
1.0           [A, D, 3]      September and October 2020
2.0, 3.0      [A, 3, D]      since; megatron-core's and this project's
============  =============  ==========================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.convert.megatron_names import TIED
from megatron_bert.convert.state import QUERY_KEY_VALUE, VOCABULARY_BIAS, VOCABULARY_TENSORS
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.errors import UserError, brief

#: Checkpoint versions that exist.
VERSIONS = (0.0, 1.0, 2.0, 3.0)
#: Megatron pads the vocabulary to a multiple of this times the tensor-parallel size.
VOCABULARY_MULTIPLE = 128
#: Bias of padding rows. Megatron's softmax runs over them too; so they take no probability from words.
PADDING_BIAS = -10000.0

_DIVIDED = {
    "attention.query_key_value.weight": 0,
    "attention.query_key_value.bias": 0,
    "attention.output.weight": 1,
    "mlp.intermediate.weight": 0,
    "mlp.intermediate.bias": 0,
    "mlp.output.weight": 1,
}


def divided_dim(name: str) -> int | None:
    """The dimension along which a tensor is divided over tensor ranks; None for one that every rank repeats."""
    if name == TIED or name in VOCABULARY_TENSORS:
        return 0
    if not name.startswith("encoder.layers."):
        return None
    return _DIVIDED.get(name.split(".", 3)[3])


def join(name: str, parts: Sequence[Tensor], version: float, heads: int) -> Tensor:
    """The whole tensor, canonical, from the parts of all tensor ranks; the first where all are alike.

    Args:
        heads: of the whole model.
    """
    dim = divided_dim(name)
    if dim is None:
        return parts[0]
    if QUERY_KEY_VALUE in name:
        parts = [to_canonical(part, version, heads // len(parts)) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def divide(name: str, tensor: Tensor, size: int, version: float, heads: int) -> list[Tensor]:
    """The inverse of :func:`join`, for ``size`` tensor ranks; vocabulary tensors must have been padded."""
    dim = divided_dim(name)
    if dim is None:
        return [tensor] * size
    parts = list(tensor.chunk(size, dim=dim))
    if QUERY_KEY_VALUE in name:
        parts = [from_canonical(part, version, heads // size) for part in parts]
    return parts


def padded_rows(words: int, tensor: int) -> int:
    """Rows of Megatron's embedding table for a vocabulary of ``words`` at a tensor-parallel size."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return -(-words // multiple) * multiple


def pad_vocabulary(name: str, tensor: Tensor, rows: int, bias: float = PADDING_BIAS) -> Tensor:
    """A vocabulary tensor with ``rows`` rows: padding is zero, and ``bias`` in the bias."""
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor
    value = bias if name.endswith(VOCABULARY_BIAS) else 0.0
    return F.pad(tensor, (0,) * (2 * tensor.dim() - 1) + (missing,), value=value)


def check_division(config: MegatronBertConfig, tensor: int, pipeline: int, virtual_stages: int) -> None:
    """Refuse a division that a model does not have (UserError)."""
    for name, size in (("--tensor", tensor), ("--pipeline", pipeline), ("--virtual-stages", virtual_stages)):
        if size < 1:
            raise UserError(f"{name} is {size}: give 1 or more")
    for what, count in (("attention heads", config.num_attention_heads), ("feed-forward", config.intermediate_size)):
        if count % tensor:
            raise UserError(f"--tensor {tensor} does not divide the {count} {what} of the model: choose one that does")
    if config.num_hidden_layers % (pipeline * virtual_stages):
        raise UserError(
            f"--pipeline {pipeline} x --virtual-stages {virtual_stages} does not divide the "
            f"{config.num_hidden_layers} layers of the model: choose sizes that do"
        )
    if virtual_stages > 1 and pipeline == 1:
        raise UserError(
            f"--virtual-stages {virtual_stages} needs --pipeline of 2 or more: there are no stages to share"
        )


def stage_layers(layers: int, pipeline: int, virtual_stages: int) -> list[list[range]]:
    """``[stage][chunk]`` -> the layers there: chunk c of stage p comes p-th in the c-th pass over the stages."""
    share = layers // (pipeline * virtual_stages)
    return [
        [
            range((chunk * pipeline + stage) * share, (chunk * pipeline + stage + 1) * share)
            for chunk in range(virtual_stages)
        ]
        for stage in range(pipeline)
    ]


def check_version(version: float, where: str) -> float:
    """The version, if there is such a one; or else UserError, in which ``where`` names what has it."""
    if version not in VERSIONS:
        raise UserError(
            f"{where} has checkpoint version {brief(version)}, but only 0, 1.0, 2.0 and 3.0 are known: "
            "if you know the order of its rows, give it with --source-checkpoint-version"
        )
    return float(version)


def to_canonical(rows: Tensor, version: float, heads: int) -> Tensor:
    """Rows ``[3 A D, ..]`` of one rank in the order of a version, brought to ``[A, 3, D]``; ``heads`` is A."""
    if version == 0.0:
        return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    if version == 1.0:
        return rows.unflatten(0, (heads, -1, 3)).transpose(1, 2).flatten(0, 2)
    return rows


def from_canonical(rows: Tensor, version: float, heads: int) -> Tensor:
    """The inverse of :func:`to_canonical`."""
    if version == 0.0:
        return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if version == 1.0:
        return rows.unflatten(0, (heads, 3, -1)).transpose(1, 2).flatten(0, 2)
    return rows
