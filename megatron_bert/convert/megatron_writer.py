# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a Megatron checkpoint, one tensor in memory at a time; legacy and megatron-core names alike."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert import divisions
from megatron_bert.convert.megatron_names import CHOICES, CLASSES, TIED
from megatron_bert.convert.megatron_shards import TRACKER
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.state import (
    TOKEN_TYPES,
    VOCABULARY_TENSORS,
    WORD_EMBEDDINGS,
    CanonicalState,
    StateTensor,
    bytes_of,
)
from megatron_bert.model.activations import GELU_APPROXIMATIONS
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import UserError
from parallel.stored.torch_archive import Slot, torch_file

#: Names at the top of a checkpoint of Megatron's.
MEGATRON_ENTRIES = rf"{re.escape(TRACKER)}|release|iter_\d{{7}}|mp_rank_\d\d+(?:_\d{{3}})?"
#: Kind of head -> Megatron's name for it.
_TASK_HEADS = {"sequence": CLASSES, "choice": CHOICES}


@dataclass(frozen=True)
class _Division:
    """A state in the parts of ``size`` tensor ranks, with ``rows`` of the vocabulary: their files hold these."""

    state: CanonicalState
    size: int
    rows: int
    version: float

    def source(self, name: str) -> StateTensor:
        """The tensor that has a name in the files, or that is copied under it."""
        return self.state[WORD_EMBEDDINGS if name == TIED else name]

    def parts(self, name: str, whole: Tensor) -> list[Tensor]:
        """What each rank has of a tensor."""
        if name == TIED or name in VOCABULARY_TENSORS:
            whole = divisions.pad_vocabulary(name, whole, self.rows)
        return divisions.divide(name, whole, self.size, self.version, self.state.config.num_attention_heads)

    def structure(self, chunk: dict[str, str], path_of: Callable[[str], list[str]]) -> dict[str, Any]:
        """The dictionaries of a chunk, the same for every rank, with a slot for each tensor."""
        model: dict[str, Any] = {}
        head = _TASK_HEADS[self.state.head or "sequence"]
        for name, local in chunk.items():
            *outer, last = (key.replace(CLASSES, head) for key in path_of(local))
            place = model
            for key in outer:
                place = place.setdefault(key, {})
            source = self.source(name)
            part = self.parts(name, torch.empty(source.shape, device="meta"))[0]
            place[last] = Slot(name, tuple(part.shape), source.dtype)
        return model


def write_megatron(
    state: CanonicalState, target: Path, options: WriteOptions, path_of: Callable[[str], list[str]], version: float
) -> None:
    """Write ``release/mp_rank_*/model_optim_rng.pt`` and the tracker file into a folder.

    Args:
        path_of: the keys of nested dictionaries for a parameter whose layer is numbered from the bottom of its chunk.
        version: of the order of query, key and value rows.

    Raises:
        UserError: the model does not divide so, or is none that Megatron has; see :func:`check_plain`.
    """
    layers, tensor, pipeline = state.config.num_hidden_layers, options.tensor, options.pipeline
    divisions.check_division(state.config, tensor, pipeline, options.virtual_stages)
    check_plain(state)
    division = _Division(state, tensor, divisions.padded_rows(state.config.vocab_size, tensor), version)
    common = {"args": megatron_args(state, options, division.rows), "checkpoint_version": version, "iteration": 0}
    for stage, chunks in enumerate(divisions.stage_layers(layers, pipeline, options.virtual_stages)):
        entries = [_chunk_entries(state, chunk, first=chunk.start == 0, last=chunk.stop == layers) for chunk in chunks]
        if stage == pipeline - 1 and pipeline > 1:
            entries[-1][TIED] = TIED
        models = [division.structure(chunk, path_of) for chunk in entries]
        content = {"model": models[0]} if len(models) == 1 else {f"model{n}": model for n, model in enumerate(models)}
        with ExitStack() as stack:
            writers = []
            for rank in range(tensor):
                folder = target / "release" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
                folder.mkdir(parents=True)
                writers.append(stack.enter_context(torch_file(folder / "model_optim_rng.pt", content | common)))
            for name in chain(*entries):
                for write, part in zip(writers, division.parts(name, division.source(name).load())):
                    write(name, bytes_of(part))
    (target / TRACKER).write_text("release", encoding="ascii")


def check_plain(state: CanonicalState) -> None:
    """Refuse a model that Megatron's BERT is not, before anything is written.

    Raises:
        UserError: its norms come after the sums, it has no head that Megatron has or one that it has not, is quantized,
            or has another activation than GELU.
    """
    remedy = "convert it to huggingface or native"
    if state.config.layer_norm_placement != "pre":
        raise UserError(
            f"the source is of a {state.config.model_type} model, which normalizes after each sum (post-layer-norm); "
            f"Megatron's normalizes before each layer, so its weights would compute something else: {remedy}"
        )
    if state.ranges is not None:
        raise UserError(f"the source is quantized, and Megatron's checkpoints have no place for its ranges: {remedy}")
    if state.head is not None and state.head not in _TASK_HEADS:
        raise UserError(
            f"the source has a head for {HEADS[state.head].title}, and Megatron's checkpoints have heads for classes "
            f"and choices only: {remedy}"
        )
    if not state.has_masked_head and not state.task_head:
        raise UserError(
            "the source holds an encoder without a masked-language head, which Megatron's checkpoints need: " + remedy
        )
    if state.config.hidden_act not in GELU_APPROXIMATIONS:
        raise UserError(
            f"the source has hidden_act {state.config.hidden_act}, but Megatron's BERT computes GELU and its "
            f"checkpoints name no other: {remedy}"
        )


def _chunk_entries(state: CanonicalState, layers: range, *, first: bool, last: bool) -> dict[str, str]:
    """Canonical name -> name with a stage-local layer number, of the tensors of one chunk."""
    entries: dict[str, str] = {}
    for name in state:
        if name.startswith("encoder.layers."):
            _, _, number, part = name.split(".", 3)
            if int(number) in layers:
                entries[name] = f"encoder.layers.{int(number) - layers.start}.{part}"
        elif name.startswith("embeddings."):
            # A model without sentence pairs has no token types in Megatron; zeros stand for them in the state.
            if first and (name != TOKEN_TYPES or _has_token_types(state)):
                entries[name] = name
        elif last:
            entries[name] = name
    return entries


def _has_token_types(state: CanonicalState) -> bool:
    """Whether the table must be written: what stands for an absent one, as it is read, need not be."""
    table = state[TOKEN_TYPES]
    return state.has_pair_head or table.shape[0] != 2 or bool(table.load().any())


def megatron_args(state: CanonicalState, options: WriteOptions, rows: int) -> argparse.Namespace:
    """The arguments that Megatron's loaders and other converters look at."""
    config = state.config
    return argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=rows,
        make_vocab_size_divisible_by=divisions.VOCABULARY_MULTIPLE,
        layernorm_epsilon=config.layer_norm_eps,
        norm_epsilon=config.layer_norm_eps,
        openai_gelu=GELU_APPROXIMATIONS[config.hidden_act] == "tanh",
        bias_gelu_fusion=False,
        hidden_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        init_method_std=config.initializer_range,
        apply_residual_connection_post_layernorm=False,
        bert_binary_head=state.has_pair_head,
        tensor_model_parallel_size=options.tensor,
        model_parallel_size=options.tensor,
        pipeline_model_parallel_size=options.pipeline,
        virtual_pipeline_model_parallel_size=options.virtual_stages if options.virtual_stages > 1 else None,
        params_dtype=state[WORD_EMBEDDINGS].dtype,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
