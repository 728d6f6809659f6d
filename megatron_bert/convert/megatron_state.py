# SPDX-License-Identifier: Apache-2.0
"""From the shards of a Megatron checkpoint to the canonical state, for legacy and megatron-core names alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert import divisions
from megatron_bert.convert.megatron_config import encoder_config
from megatron_bert.convert.megatron_shards import Checkpoint, flat_tensors
from megatron_bert.convert.options import ReadOptions
from megatron_bert.convert.state import (
    POOLER,
    TOKEN_TYPES,
    VOCABULARY_BIAS,
    VOCABULARY_TENSORS,
    WORD_EMBEDDINGS,
    CanonicalState,
    SourceFacts,
    StateTensor,
)
from parallel.errors import UserError, brief
from parallel.stored.stored_tensor import StoredTensor

#: What a renaming returns for the output matrix, a copy of the word embeddings.
TIED = "tied"
#: Megatron's heads of fine-tuning tasks, alike but for their names.
CLASSES, CHOICES = "classification_head", "multichoice_head"
TASK_HEAD = re.compile(rf"(?:{CLASSES}|{CHOICES})\.(weight|bias)")
_LAYER = re.compile(r"encoder\.layers\.(\d{1,6})\.(.+)")

#: From a source's name (layers numbered from the bottom of the piece) to the canonical one; None if it is unknown.
Renaming = Callable[[str], str | None]


@dataclass(frozen=True)
class _Part:
    """One rank's part of a tensor."""

    tensor: StoredTensor
    origin: str


def read_state(
    checkpoint: Checkpoint, rename: Renaming, options: ReadOptions, *, format_name: str, variant: str
) -> CanonicalState:
    """The canonical state of a checkpoint.

    Raises:
        UserError: parts are missing or do not fit.
    """
    warnings: list[str] = []
    parts = _collect(checkpoint, rename)
    if WORD_EMBEDDINGS not in parts:
        raise UserError(f"{checkpoint.first.label} holds no word embeddings: it is not a BERT model of Megatron")
    _check_objective(checkpoint, parts)
    shapes = {name: _joined_shape(name, found) for name, found in parts.items()}
    config, true_size, assumptions = encoder_config(checkpoint, shapes, options)
    version = checkpoint.version
    if version is None:
        version = 0.0 if format_name == "megatron" else 3.0
        if format_name == "megatron":
            assumptions.append(
                "no checkpoint version is stored: 0 was taken, query, key and value rows as [3, heads, head_dim]; "
                "files of late September 2020 need --source-checkpoint-version 1.0"
            )
    tied = parts.pop(TIED, None)
    tensors = {
        name: _tensor(name, found, shapes[name], config.num_attention_heads, version, warnings)
        for name, found in parts.items()
    }
    if tied is not None:
        tensors[WORD_EMBEDDINGS] = _checked_tie(tensors[WORD_EMBEDDINGS], parts[WORD_EMBEDDINGS], tied, warnings)
    for name in VOCABULARY_TENSORS & tensors.keys():
        tensors[name] = trimmed(tensors[name], config.vocab_size)
    if TOKEN_TYPES not in tensors:
        tensors[TOKEN_TYPES] = absent_token_types(config.type_vocab_size, tensors[WORD_EMBEDDINGS])
        assumptions.append("there are no token-type embeddings: zeros stand for them")
    facts = SourceFacts(
        format=format_name,
        variant=variant,
        files=checkpoint.tensor * checkpoint.pipeline,
        tensor=checkpoint.tensor,
        pipeline=checkpoint.pipeline,
        virtual_stages=len(checkpoint.first.chunks()),
        checkpoint_version=version,
        iteration=checkpoint.iteration,
        true_vocab_size=true_size,
        stored_rows=shapes[WORD_EMBEDDINGS][0],
        assumptions=tuple(assumptions),
    )
    head: str | None = None
    if "classifier.weight" in parts:
        head = "choice" if CHOICES in parts["classifier.weight"][0].origin else "sequence"
    return CanonicalState(config=config, facts=facts, tensors=tensors, head=head, warnings=warnings)


def _check_objective(checkpoint: Checkpoint, parts: dict[str, list[_Part]]) -> None:
    """Refuse Megatron's GPT, whose layers are those of its BERT but whose attention sees only the past.

    A GPT has neither token types nor a head of its own. Megatron's BERT lost its token types with
    ``--bert-no-binary-head``, but then kept its masked-language head; and one that was fine-tuned lost that head, but
    kept its token types and pooler.
    """
    if parts.keys().isdisjoint((TOKEN_TYPES, VOCABULARY_BIAS, POOLER)):
        raise UserError(
            f"{checkpoint.first.label} holds neither token types, a pooler nor a masked-language head: it is of "
            "Megatron's GPT or another decoder, which has the layers of a BERT but attends to the past only and cannot "
            "be converted"
        )


def _collect(checkpoint: Checkpoint, rename: Renaming) -> dict[str, list[_Part]]:
    """Canonical name -> parts by tensor rank, layers numbered from the bottom of the whole stack."""
    parts: dict[str, list[_Part]] = {}
    first_layer = 0
    for piece in checkpoint.pieces():
        layers: set[int] = set()
        renamed = []
        for shard, chunk in piece:
            names: dict[str, _Part] = {}
            for key, tensor in flat_tensors(shard.label, chunk).items():
                name = rename(key)
                if name is None:
                    raise UserError(
                        f"{shard.label} holds {brief(key)}, which no BERT model of Megatron has: wrong file?"
                    )
                match = _LAYER.fullmatch(name)
                if match is not None:
                    layers.add(int(match[1]))
                    name = f"encoder.layers.{first_layer + int(match[1])}.{match[2]}"
                names[name] = _Part(tensor, f"{shard.label}: {key}")
            renamed.append((shard, names))
        _merge_piece(renamed, parts)
        if layers != set(range(len(layers))):
            raise UserError(
                f"{piece[0][0].label} holds layers {sorted(layers)[:4]}... of its stage, which do not count from 0: "
                "layers are missing"
            )
        first_layer += len(layers)
    return parts


def _merge_piece(renamed: list[tuple[Any, dict[str, _Part]]], parts: dict[str, list[_Part]]) -> None:
    """Add the parts of one piece, held by all tensor ranks alike, to those of the pieces below."""
    first_shard, first = renamed[0]
    for shard, names in renamed[1:]:
        different = sorted(first.keys() ^ names.keys())
        if different:
            holder, other = (first_shard, shard) if different[0] in first else (shard, first_shard)
            raise UserError(
                f"{holder.label} holds {different[0]}, but {other.label} does not: a shard is damaged, "
                "or they are of two checkpoints"
            )
    for name in first:
        if name in parts:
            raise UserError(
                f"{first[name].origin} is there a second time (also {parts[name][0].origin}): "
                "the folder mixes two checkpoints"
            )
        parts[name] = [names[name] for _, names in renamed]


def _joined_shape(name: str, parts: list[_Part]) -> tuple[int, ...]:
    first = parts[0].tensor
    dim = 0 if name == TIED else divisions.divided_dim(name)
    for part in parts[1:]:
        if part.tensor.shape != first.shape or part.tensor.dtype != first.dtype:
            raise UserError(
                f"{part.origin} is {list(part.tensor.shape)} {part.tensor.dtype}, but {parts[0].origin} is "
                f"{list(first.shape)} {first.dtype}: the shards are of two checkpoints"
            )
    shape = list(first.shape)
    if dim is not None:
        if dim >= len(shape):
            raise UserError(f"{parts[0].origin} has shape {shape}, too few dimensions: the file is damaged")
        shape[dim] *= len(parts)
    return tuple(shape)


def _tensor(
    name: str, parts: list[_Part], shape: tuple[int, ...], heads: int, version: float, warnings: list[str]
) -> StateTensor:
    if divisions.divided_dim(name) is not None:

        def load() -> Tensor:
            return divisions.join(name, [part.tensor.load() for part in parts], version, heads)

    else:

        def load() -> Tensor:
            whole = parts[0].tensor.load()
            for part in parts[1:]:
                _compare(whole, part.tensor.load(), part.origin, parts[0].origin, warnings)
            return whole

    return StateTensor(shape, parts[0].tensor.dtype, load, parts[0].origin)


def _compare(expected: Tensor, other: Tensor, origin: str, reference: str, warnings: list[str]) -> None:
    """Copies that should be alike: rounding apart is worth a word, more is an error."""
    if torch.equal(expected, other):
        return
    difference = (expected.double() - other.double()).norm() / expected.double().norm().clamp(min=1e-30)
    if not difference < 1e-2:
        raise UserError(
            f"{origin} should be a copy of {reference}, but differs by {float(difference):.1%}: the shards are of two "
            "checkpoints, or the model is of another kind"
        )
    warnings.append(f"{origin} differs from {reference} by {float(difference):.1e}, though it should be a copy")


def _checked_tie(table: StateTensor, parts: list[_Part], tied: list[_Part], warnings: list[str]) -> StateTensor:
    """The word embeddings, checked when read against the output matrix of the last stage."""

    def check(whole: Tensor) -> Tensor:
        for rows, copy in zip(whole.chunk(len(tied)), tied):
            _compare(rows, copy.tensor.load(), copy.origin, parts[0].origin, warnings)
        return whole

    shape = (tied[0].tensor.shape[0] * len(tied), *tied[0].tensor.shape[1:])
    if shape != table.shape:
        raise UserError(
            f"{tied[0].origin} makes an output matrix of {list(shape)}, but the word embeddings are "
            f"{list(table.shape)}: a model whose output matrix is not tied cannot be converted"
        )
    return table.mapped(check)


def trimmed(tensor: StateTensor, words: int) -> StateTensor:
    """A vocabulary tensor without padding."""
    if tensor.shape[0] == words:
        return tensor
    return tensor.mapped(lambda rows: rows[:words].clone(), shape=(words, *tensor.shape[1:]))


def absent_token_types(types: int, like: StateTensor) -> StateTensor:
    """Zero token-type embeddings, for models that were trained without: they add nothing."""
    shape = (types, like.shape[1])
    return StateTensor(shape, like.dtype, lambda: torch.zeros(shape, dtype=like.dtype), "(no token types)")
