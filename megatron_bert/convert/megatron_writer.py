# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a Megatron checkpoint, one tensor in memory at a time; legacy and megatron-core names alike."""

from __future__ import annotations

import argparse
import re
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bert.convert import divisions
from megatron_bert.convert.megatron_shards import TRACKER
from megatron_bert.convert.megatron_state import CHOICES, CLASSES
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.progress import Progress
from megatron_bert.convert.state import TOKEN_TYPES, VOCABULARY_TENSORS, WORD_EMBEDDINGS, CanonicalState, StateTensor
from megatron_bert.convert.torch_writer import TorchFileWriter
from megatron_bert.model.activations import GELU_APPROXIMATIONS
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import UserError
from parallel.stored.torch_pickles import Slot

#: Names at the top of a checkpoint of Megatron's.
MEGATRON_ENTRIES = rf"{re.escape(TRACKER)}|release|iter_\d{{7}}|mp_rank_\d\d+(?:_\d{{3}})?"
_COPY = " (output copy)"
#: Kind of head -> Megatron's name for it.
_TASK_HEADS = {"sequence": CLASSES, "choice": CHOICES}


class MegatronNames(ABC):
    """The names of one generation of Megatron."""

    @abstractmethod
    def path(self, name: str) -> tuple[str, ...]:
        """Keys of the nested dictionaries under ``model``, for a canonical name with a stage-local layer number."""

    @abstractmethod
    def tied_path(self) -> tuple[str, ...]:
        """The same, for the last stage's copy of the word embeddings."""


def write_megatron(
    state: CanonicalState, target: Path, options: WriteOptions, names: MegatronNames, version: float, progress: Progress
) -> None:
    """Write ``release/mp_rank_*/model_optim_rng.pt`` and the tracker file into a folder.

    Raises:
        UserError: the model does not divide so, or is none that Megatron has; see :func:`check_plain`.
    """
    config, tensor, pipeline = state.config, options.tensor, options.pipeline
    divisions.check_division(config, tensor, pipeline, options.virtual_stages)
    check_plain(state)
    rows = divisions.padded_rows(config.vocab_size, tensor)
    args = megatron_args(state, options, rows)
    stages = divisions.stage_layers(config.num_hidden_layers, pipeline, options.virtual_stages)
    for stage, chunks in enumerate(stages):
        entries = [
            _chunk_entries(state, layers, first=stage == 0 and chunk == 0, last=layers.stop == config.num_hidden_layers)
            for chunk, layers in enumerate(chunks)
        ]
        if stage == pipeline - 1 and pipeline > 1:
            entries[-1][WORD_EMBEDDINGS + _COPY] = WORD_EMBEDDINGS + _COPY
        with ExitStack() as stack:
            writers = []
            for rank in range(tensor):
                folder = target / "release" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
                folder.mkdir(parents=True)
                structure = _structure(state, entries, names, tensor, rows)
                structure |= {"args": args, "checkpoint_version": version, "iteration": 0}
                writers.append(stack.enter_context(TorchFileWriter(folder / "model_optim_rng.pt", structure)))
            for name in (name for chunk in entries for name in chunk):
                _write_parts(state, name, writers, version, rows, progress)
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


def task_head(state: CanonicalState) -> str:
    """Megatron's name for the head of a task."""
    return _TASK_HEADS[state.head or "sequence"]


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


def _structure(
    state: CanonicalState, entries: list[dict[str, str]], names: MegatronNames, tensor: int, rows: int
) -> dict[str, Any]:
    """The dictionary of one file, the same for every tensor rank, with a slot for each tensor."""
    models: list[dict[str, Any]] = []
    for chunk in entries:
        model: dict[str, Any] = {}
        for name, local in chunk.items():
            *outer, last = names.tied_path() if name.endswith(_COPY) else names.path(local)
            place = model
            for key in outer:
                place = place.setdefault(key, {})
            source = name.removesuffix(_COPY)
            place[last] = Slot(name, _part_shape(source, state[source], tensor, rows), state[source].dtype)
        models.append(model)
    if len(models) == 1:
        return {"model": models[0]}
    return {f"model{number}": model for number, model in enumerate(models)}


def _part_shape(name: str, tensor: StateTensor, size: int, rows: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if name in VOCABULARY_TENSORS:
        shape[0] = rows
    dim = divisions.divided_dim(name)
    if dim is not None:
        shape[dim] //= size
    return tuple(shape)


def _write_parts(
    state: CanonicalState, name: str, writers: list[TorchFileWriter], version: float, rows: int, progress: Progress
) -> None:
    source = name.removesuffix(_COPY)
    whole: Tensor = state[source].load()
    if source in VOCABULARY_TENSORS:
        whole = divisions.pad_vocabulary(source, whole, rows)
    parts = divisions.divide(source, whole, len(writers), version, state.config.num_attention_heads)
    for writer, part in zip(writers, parts):
        writer.write(name, part)
    progress.update(state[source].nbytes)


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
