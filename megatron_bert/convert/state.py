# SPDX-License-Identifier: Apache-2.0
"""The canonical state: what every format is read into and written from.

Tensors carry the names of :class:`megatron_bert.model.pretraining.BertForPretraining` and of
:class:`megatron_bert.model.finetuning.BertForTask`, and are not padded: the embedding table and ``masked_head.bias``
have ``config.vocab_size`` rows. Query, key and value are one matrix with rows ordered ``[heads, 3, head_dim]``. Nothing
is in memory: each tensor is read when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert.options import DTYPE_NAMES
from megatron_bert.convert.ranges import Ranges
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.model.task_heads.table import HEADS, of_head
from parallel.errors import UserError, brief

WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
VOCABULARY_BIAS = "masked_head.bias"
POOLER = "pair_head.pooler.weight"
#: Tensors with a row for each word; they are padded and trimmed together.
VOCABULARY_TENSORS = frozenset({WORD_EMBEDDINGS, VOCABULARY_BIAS})
_FIRST_LAYER = "encoder.layers.0."
_PRETRAINING_HEADS = ("masked_head.", "pair_head.pooler.", "pair_head.classifier.")
QUERY_KEY_VALUE = "attention.query_key_value"
#: Fields of a configuration that every model has.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"),
    *("initializer_range", "layer_norm_eps", "pad_token_id"),
)
#: Number formats a checkpoint may hold and be written in.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a state, unread.

    Attributes:
        load: reads it: contiguous, on the CPU, in memory that the caller may change.
        origin: file and key it comes from, for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    origin: str

    @staticmethod
    def held(values: Tensor, origin: str) -> StateTensor:
        """A tensor that is in memory."""
        return StateTensor(tuple(values.shape), values.dtype, values.clone, origin)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def expect(self, shape: tuple[int, ...], whence: str, remedy: str) -> None:
        """Refuse another shape (UserError) than ``whence``, such as "the task makes it"."""
        if self.shape != shape:
            raise UserError(f"{self.origin} has shape {list(self.shape)}, but {whence} {list(shape)}: {remedy}")

    def mapped(self, function: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None) -> StateTensor:
        """The same tensor with a function applied when it is read; ``shape`` where that changes it."""
        load = self.load
        return replace(self, shape=self.shape if shape is None else shape, load=lambda: function(load()))


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What is known of where a state comes from.

    Attributes:
        format: name in the table of formats.
        variant: which of its variants, in words.
        files: number of files with tensors.
        tensor, pipeline, virtual_stages: how the source is divided.
        checkpoint_version: Megatron's version of the order of query, key and value rows; None where there is none.
        iteration: training step, or None.
        true_vocab_size: number of words, where the source or the user says it; None when all rows count as words.
        stored_rows: rows of the embedding table as stored.
        assumptions: what the source does not say and was assumed; a user should read them.
        architecture: the class of transformers that the source names; None where it names none.
    """

    format: str
    variant: str
    files: int
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    checkpoint_version: float | None = None
    iteration: int | None = None
    true_vocab_size: int | None = None
    stored_rows: int
    assumptions: tuple[str, ...] = ()
    architecture: str | None = None


@dataclass(frozen=True, kw_only=True)
class CanonicalState(Mapping[str, StateTensor]):
    """A model, unread: global name -> tensor, with its configuration.

    Attributes:
        config: of the encoder, of the class of its family; with the names of the classes of a head.
        tensors: by name; checked against ``config``.
        head: kind of the head of a task, in the table of them, that the model was saved with; None of a pretrained one.
        ranges: of a quantized model, whose tensors are those of the float model; None of any other.
        task: what ``task.json`` says beside a model that was fine-tuned here; None for other sources.
        optimizer: ``<moment>.<name>`` -> tensor, of our own training checkpoints only.
        run_state: what our own training checkpoints hold besides tensors; None for other sources.
        warnings: found while tensors are read.
        label: the path it was found at, for messages.
    """

    config: MegatronBertConfig
    facts: SourceFacts
    tensors: dict[str, StateTensor]
    head: str | None = None
    ranges: Ranges | None = None
    task: dict[str, Any] | None = None
    optimizer: dict[str, StateTensor] = field(default_factory=dict)
    run_state: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    label: str = "the checkpoint"

    def __post_init__(self) -> None:
        if self.tensors:  # none where only settings are read
            _check_shapes(self.config, self.tensors, self.head)

    def __getitem__(self, name: str) -> StateTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def parameters(self) -> int:
        """Number of parameters, without padding."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def has_masked_head(self) -> bool:
        """Whether the masked-language head is there."""
        return VOCABULARY_BIAS in self.tensors

    @property
    def has_pooler(self) -> bool:
        """Whether the pooler is there."""
        return POOLER in self.tensors

    @property
    def has_pair_head(self) -> bool:
        """Whether pooler and pair classifier are there."""
        return self.has_pooler and "pair_head.classifier.weight" in self.tensors

    @property
    def task_head(self) -> list[str]:
        """Names of the tensors of a task's head, without its pooler."""
        return [name for name in self.tensors if of_head(name)]

    def without_head(self) -> CanonicalState:
        """The same state without the head of a task and the ranges: what another task starts from."""
        head = self.task_head
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in head}
        return replace(self, tensors=tensors, head=None, ranges=None, task=None)

    def in_dtype(self, dtype: torch.dtype) -> CanonicalState:
        """The same state with the model's tensors converted when they are read.

        Raises:
            UserError: (when read) a finite value does not fit.
        """
        return replace(self, tensors={name: _converted(name, t, dtype) for name, t in self.tensors.items()})


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a tensor, in its order of elements."""
    return values.detach().contiguous().flatten().view(torch.uint8).numpy().data


def not_finite(values: Tensor) -> int:
    """Number of values that are NaN or infinite."""
    finite = torch.isfinite(values)
    return 0 if finite.all() else int((~finite).sum())


def without_padding(tensors: Mapping[str, StateTensor], config: MegatronBertConfig) -> dict[str, StateTensor]:
    """Tensors, or states of an optimizer, without the rows of no word."""

    def trimmed(tensor: StateTensor) -> StateTensor:
        words = config.vocab_size
        if not tensor.shape or tensor.shape[0] == words:
            return tensor
        return tensor.mapped(lambda rows: rows[:words].clone(), shape=(words, *tensor.shape[1:]))

    padded = tuple(VOCABULARY_TENSORS)
    return {name: trimmed(tensor) if name.endswith(padded) else tensor for name, tensor in tensors.items()}


def _converted(name: str, tensor: StateTensor, dtype: torch.dtype) -> StateTensor:
    if tensor.dtype == dtype:
        return tensor

    def convert(values: Tensor) -> Tensor:
        result = values.to(dtype)
        if torch.isfinite(values).all() and not torch.isfinite(result).all():
            raise UserError(f"{name} ({tensor.origin}) has values too large for {dtype}: use bfloat16 or float32")
        return result

    return replace(tensor.mapped(convert), dtype=dtype)


def pretraining_tensors(config: MegatronBertConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a pretraining model has, by the model itself."""
    try:
        model = BertForPretraining(replace(config, num_hidden_layers=1, binary_head=True), device="meta")
    except RuntimeError as error:
        raise UserError(f"the source gives sizes that no model has ({brief(error)}): it is damaged") from None
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        rows = config.vocab_size if name in VOCABULARY_TENSORS else parameter.shape[0]
        part = name.removeprefix(_FIRST_LAYER)
        names = [name] if part == name else [f"encoder.layers.{i}.{part}" for i in range(config.num_hidden_layers)]
        found |= dict.fromkeys(names, (rows, *parameter.shape[1:]))
    return found


def classes_of(tensors: Mapping[str, StateTensor]) -> int | None:
    """The number of classes by the size of a head; None where there is no such head."""
    kinds = [kind for kind in HEADS.values() if kind.outputs is None]
    layers = [kind.layers(like_roberta=like_roberta)[-1] for like_roberta in (True, False) for kind in kinds]
    shapes = (tensors[name].shape for layer in layers if (name := f"{layer}.bias") in tensors)
    return next((shape[0] for shape in shapes if len(shape) == 1 and shape[0]), None)


def _check_shapes(config: MegatronBertConfig, tensors: Mapping[str, StateTensor], head: str | None) -> None:
    # First, because names of a billion layers could not even be listed.
    if config.num_hidden_layers > len(tensors):
        raise UserError(
            f"the source says it has {config.num_hidden_layers} layers, but holds only {len(tensors)} tensors: "
            "a part of it is missing"
        )
    shapes = pretraining_tensors(config)
    expected = {name: shape for name, shape in shapes.items() if not name.startswith(_PRETRAINING_HEADS)}
    # Each of the parts on top is there as a whole or not at all.
    parts = [{name: shape for name, shape in shapes.items() if name.startswith(part)} for part in _PRETRAINING_HEADS]
    # Of kinds with the same names, the one that is named gives the shapes, or else the last, with a row for each class.
    for kind in [*([HEADS[head]] if head else []), *reversed(HEADS.values())]:
        found = kind.tensors(config, kind.width(config))
        if not any(found.keys() & part.keys() for part in parts):
            parts.append(found)
    for part in parts:
        if part.keys() & tensors.keys():
            expected |= part
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(
            f"{len(missing)} tensors are missing, the first is {missing[0]} (others come from "
            f"{next(iter(tensors.values())).origin}): a part of the checkpoint is not there, or it is of another kind "
            "of model"
        )
    if extra := [name for name in tensors if name not in expected]:
        raise UserError(
            f"{tensors[extra[0]].origin} does not belong to an encoder of {config.num_hidden_layers} layers: "
            "the source mixes two models, or is of another kind"
        )
    for name, shape in expected.items():
        remedy = "the source mixes two models, or its settings are not its own"
        tensors[name].expect(shape, "the sizes of the model make it", remedy)
        if tensors[name].dtype not in DTYPES.values() and tensors[name].dtype != torch.float64:
            raise UserError(f"{tensors[name].origin} holds {tensors[name].dtype} values: expected floating point")
