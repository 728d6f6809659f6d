# SPDX-License-Identifier: Apache-2.0
"""From the shards of a Megatron checkpoint to the canonical state, for legacy and megatron-core names alike."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from megatron_bert.convert import divisions
from megatron_bert.convert.megatron_config import encoder_config
from megatron_bert.convert.megatron_names import CHOICES, TIED
from megatron_bert.convert.megatron_shards import Checkpoint, Shard
from megatron_bert.convert.name_table import NameTable
from megatron_bert.convert.options import ReadOptions
from megatron_bert.convert.state import (
    POOLER,
    TOKEN_TYPES,
    VOCABULARY_BIAS,
    WORD_EMBEDDINGS,
    CanonicalState,
    SourceFacts,
    StateTensor,
    without_padding,
)
from parallel.errors import UserError, brief

_LAYER = re.compile(r"encoder\.layers\.(\d{1,6})\.(.+)")


def read_state(
    checkpoint: Checkpoint, names: NameTable, options: ReadOptions, *, format_name: str, variant: str
) -> CanonicalState:
    """The canonical state of a checkpoint.

    Raises:
        UserError: parts are missing or do not fit.
    """
    warnings: list[str] = []
    parts = _collect(checkpoint, names)
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
        name: _joined(name, found, shapes[name], config.num_attention_heads, version, warnings)
        for name, found in parts.items()
    }
    if tied is not None:
        tensors[WORD_EMBEDDINGS] = _checked_tie(tensors[WORD_EMBEDDINGS], tied, shapes[TIED], warnings)
    tensors = without_padding(tensors, config)
    if TOKEN_TYPES not in tensors:
        dtype = tensors[WORD_EMBEDDINGS].dtype
        zeros = torch.zeros(config.type_vocab_size, config.hidden_size, dtype=dtype)
        tensors[TOKEN_TYPES] = StateTensor.held(zeros, "(no token types)")
        assumptions.append("there are no token-type embeddings: zeros stand for them")
    facts = SourceFacts(
        format=format_name,
        variant=variant,
        files=checkpoint.tensor * checkpoint.pipeline,
        tensor=checkpoint.tensor,
        pipeline=checkpoint.pipeline,
        virtual_stages=len(checkpoint.first.chunks),
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


def _check_objective(checkpoint: Checkpoint, parts: dict[str, list[StateTensor]]) -> None:
    """Refuse Megatron's GPT, whose layers are those of its BERT but whose attention sees only the past."""
    # A GPT has neither token types nor a head of its own. A BERT lost its token types with --bert-no-binary-head, but
    # kept its masked-language head; and one that was fine-tuned lost that, but kept its token types and pooler.
    if parts.keys().isdisjoint((TOKEN_TYPES, VOCABULARY_BIAS, POOLER)):
        raise UserError(
            f"{checkpoint.first.label} holds neither token types, a pooler nor a masked-language head: it is of "
            "Megatron's GPT or another decoder, which has the layers of a BERT but attends to the past only and cannot "
            "be converted"
        )


def _collect(checkpoint: Checkpoint, names: NameTable) -> dict[str, list[StateTensor]]:
    """Canonical name -> parts by tensor rank, layers numbered from the bottom of the whole stack."""
    parts: dict[str, list[StateTensor]] = {}
    first_layer = 0
    for piece in checkpoint.pieces():
        layers: set[int] = set()
        renamed = []
        for shard, chunk in piece:
            found: dict[str, StateTensor] = {}
            for key, tensor in chunk.items():
                place = names.ours(key)
                if place is None:
                    raise UserError(
                        f"{shard.label} holds {brief(key)}, which no BERT model of Megatron has: wrong file?"
                    )
                name = place.owner
                if (match := _LAYER.fullmatch(name)) is not None:
                    layers.add(int(match[1]))
                    name = f"encoder.layers.{first_layer + int(match[1])}.{match[2]}"
                found[name] = tensor
            renamed.append((shard, found))
        _merge_piece(renamed, parts)
        if layers != set(range(len(layers))):
            raise UserError(
                f"{piece[0][0].label} holds layers {sorted(layers)[:4]}... of its stage, which do not count from 0: "
                "layers are missing"
            )
        first_layer += len(layers)
    return parts


def _merge_piece(renamed: list[tuple[Shard, dict[str, StateTensor]]], parts: dict[str, list[StateTensor]]) -> None:
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


def _joined_shape(name: str, parts: list[StateTensor]) -> tuple[int, ...]:
    first = parts[0]
    dim = divisions.divided_dim(name)
    for part in parts[1:]:
        if part.shape != first.shape or part.dtype != first.dtype:
            raise UserError(
                f"{part.origin} is {list(part.shape)} {part.dtype}, but {first.origin} is "
                f"{list(first.shape)} {first.dtype}: the shards are of two checkpoints"
            )
    shape = list(first.shape)
    if dim is not None:
        if dim >= len(shape):
            raise UserError(f"{first.origin} has shape {shape}, too few dimensions: the file is damaged")
        shape[dim] *= len(parts)
    return tuple(shape)


def _joined(
    name: str, parts: list[StateTensor], shape: tuple[int, ...], heads: int, version: float, warnings: list[str]
) -> StateTensor:
    def load() -> Tensor:
        if divisions.divided_dim(name) is not None:
            return divisions.join(name, [part.load() for part in parts], version, heads)
        whole = parts[0].load()
        for part in parts[1:]:
            _compare(whole, part, parts[0], warnings)
        return whole

    return replace(parts[0], shape=shape, load=load)


def _compare(expected: Tensor, copy: StateTensor, original: StateTensor, warnings: list[str]) -> None:
    """Copies that should be alike: rounding apart is worth a word, more is an error."""
    other = copy.load()
    if torch.equal(expected, other):
        return
    difference = (expected.double() - other.double()).norm() / expected.double().norm().clamp(min=1e-30)
    if not difference < 1e-2:
        raise UserError(
            f"{copy.origin} should be a copy of {original.origin}, but differs by {float(difference):.1e} times its "
            "size: the shards are of two checkpoints, or the model is of another kind"
        )
    warnings.append(
        f"{copy.origin} differs from {original.origin} by {float(difference):.1e}, though it should be a copy"
    )


def _checked_tie(
    table: StateTensor, tied: list[StateTensor], shape: tuple[int, ...], warnings: list[str]
) -> StateTensor:
    """The word embeddings, checked when read against the output matrix of the last stage."""

    def check(whole: Tensor) -> Tensor:
        for rows, copy in zip(whole.chunk(len(tied)), tied):
            _compare(rows, copy, table, warnings)
        return whole

    if shape != table.shape:
        raise UserError(
            f"{tied[0].origin} makes an output matrix of {list(shape)}, but the word embeddings are "
            f"{list(table.shape)}: a model whose output matrix is not tied cannot be converted"
        )
    return table.mapped(check)
