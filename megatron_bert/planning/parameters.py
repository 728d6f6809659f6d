# SPDX-License-Identifier: Apache-2.0
"""The parameters of a stage by name and shape, in the order of its modules, without building any."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.planning.workload import TaskHead
from parallel.pipeline.stage import StagePart

#: So many parameters of layers are communicated at a time; see :mod:`parallel.data_parallel`.
GROUP_PARAMETERS = 2**25
WORDS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        name: global.
        shape: of the whole.
        divided: dimension that tensor ranks divide; None for one that they copy.
        partial: whether it sees only a rank's tokens under sequence parallelism.
    """

    name: str
    shape: tuple[int, ...]
    divided: int | None = None
    partial: bool = False

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """On one of so many tensor ranks."""
        return tuple(size // tensor if dim == self.divided else size for dim, size in enumerate(self.shape))

    def local(self, tensor: int) -> int:
        """Numbers on one of so many tensor ranks."""
        return math.prod(self.local_shape(tensor))


@dataclass(frozen=True)
class StageParameters:
    """The parameters of a stage.

    Attributes:
        root: of embeddings and heads.
        layers: of each layer.
    """

    root: tuple[Parameter, ...]
    layers: tuple[tuple[Parameter, ...], ...]

    def __iter__(self) -> Iterator[Parameter]:
        yield from self.root
        for layer in self.layers:
            yield from layer


def stage_parameters(config: MegatronBertConfig, part: StagePart, head: TaskHead | None = None) -> StageParameters:
    """The parameters of a stage.

    Args:
        head: of a fine-tuning task; None for those of pretraining.
    """
    root: list[Parameter] = []
    size, rows = config.hidden_size, config.padded_vocab_size
    if part.first or (part.last and head is None):
        root.append(Parameter(WORDS, (rows, size), 0))
    if part.first:
        root.append(
            Parameter("embeddings.position_embeddings.weight", (config.max_position_embeddings, size), None, True)
        )
        root.append(Parameter("embeddings.token_type_embeddings.weight", (config.type_vocab_size, size), None, True))
        if config.layer_norm_placement == "post":
            root += _norm("embeddings.norm", size, partial=True)
    if part.last and config.layer_norm_placement == "pre":
        root += _norm("encoder.final_norm", size, partial=True)
    if part.last and head is None:
        root.append(Parameter("masked_head.bias", (rows,), 0))
        root += _dense("masked_head.dense", size, size)
        root += _norm("masked_head.norm", size, partial=False)
        if config.binary_head:
            root += _dense("pair_head.pooler", size, size)
            root += _dense("pair_head.classifier", size, 2)
    elif part.last and head is not None:
        # Where both are on the last stage, names are those of a pooler; RoBERTa's head has the same sizes.
        root += _dense("pair_head.pooler", size, size) if head.pooled else ()
        root += _dense("classifier", size, head.outputs)
    return StageParameters(tuple(root), tuple(_layer(config, number) for number in part.layers))


def _layer(config: MegatronBertConfig, number: int) -> tuple[Parameter, ...]:
    name, size, wide = f"encoder.layers.{number}", config.hidden_size, config.intermediate_size
    return (
        *_norm(f"{name}.attention_norm", size, partial=True),
        Parameter(f"{name}.attention.query_key_value.weight", (3 * size, size), 0),
        Parameter(f"{name}.attention.query_key_value.bias", (3 * size,), 0),
        Parameter(f"{name}.attention.output.weight", (size, size), 1),
        Parameter(f"{name}.attention.output.bias", (size,), None, True),
        *_norm(f"{name}.mlp_norm", size, partial=True),
        Parameter(f"{name}.mlp.intermediate.weight", (wide, size), 0),
        Parameter(f"{name}.mlp.intermediate.bias", (wide,), 0),
        Parameter(f"{name}.mlp.output.weight", (size, wide), 1),
        Parameter(f"{name}.mlp.output.bias", (size,), None, True),
    )


def _norm(name: str, size: int, *, partial: bool) -> tuple[Parameter, Parameter]:
    return Parameter(f"{name}.weight", (size,), None, partial), Parameter(f"{name}.bias", (size,), None, partial)


def _dense(name: str, inputs: int, outputs: int) -> tuple[Parameter, Parameter]:
    return Parameter(f"{name}.weight", (outputs, inputs)), Parameter(f"{name}.bias", (outputs,))
