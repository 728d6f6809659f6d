# SPDX-License-Identifier: Apache-2.0
"""This project's own checkpoints: torch.distributed.checkpoint files and state.json, as training runs write them.

Tensors are named ``model.<name>`` and ``optimizer.<moment>.<name>``, and those with a row for each word are padded with
zeros. They fit every layout, so there is nothing to divide. Torch's own reader loads ``.metadata`` with an unrestricted
pickle, and its writer keeps every tensor of a file in memory until the file is finished; both matter here, so tensors
go one by one the way of training checkpoints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert.divisions import pad_vocabulary
from megatron_bert.convert.files import FileTree
from megatron_bert.convert.megatron_config import true_vocab_size
from megatron_bert.convert.options import GELU_NAMES, ReadOptions, WriteOptions
from megatron_bert.convert.ranges import VERSION, Ranges, check_version
from megatron_bert.convert.state import (
    SIZES,
    VOCABULARY_TENSORS,
    WORD_EMBEDDINGS,
    CanonicalState,
    SourceFacts,
    StateTensor,
    bytes_of,
    classes_of,
    without_padding,
)
from megatron_bert.json_file import read_json, section
from megatron_bert.model.configuration import MegatronBertConfig, RobertaConfig, config_from_dict, numbered_labels
from megatron_bert.model.task_heads.table import HEADS, head_of_parameters
from parallel.checkpoint import HAS_MANIFEST, STATE_FILE, check_files
from parallel.checkpoint_plan import global_plans, local_plan
from parallel.errors import UserError, brief
from parallel.file_process import write_pieces
from parallel.manifest import MANIFEST_FILE, FileSums, Manifest, write_manifest
from parallel.stored.distributed_files import LARGE, METADATA, BlockedTensor, read_block, read_metadata
from parallel.stored.file_range import FileRange
from parallel.stored.pickles import PLAIN
from parallel.whole_files import write_text

_MODEL, _OPTIMIZER, _RANGE = "model.", "optimizer.", ".range"
#: Keys of state.json: what the model is fine-tuned for, how it was quantized, and for which arithmetic.
_TASK, _QUANTIZATION, _ARITHMETIC = "task", "quantization", "arithmetic"
#: Settings of the section ``data`` of a run that say how files are read, not which.
HOW_TO_READ = ("format", "columns", "header", "label_separator", "on_bad_row")
#: A tensor that only a post-layer-norm model has.
_POST_NORM = "embeddings.norm.weight"
#: Key of state.json under which the encoder's configuration stands.
CONFIG_KEY = "config"


class Native:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "native"
    entries = rf"\.metadata|__\d+_\d+\.distcp|{re.escape(STATE_FILE)}|{re.escape(MANIFEST_FILE)}"

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds the two files that make a checkpoint whole."""
        return METADATA in tree and STATE_FILE in tree

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open a checkpoint of a run at any layout, with its optimizer."""
        manifest = None if tree.folder is None else check_files(tree.folder)
        run_state, label = read_json(tree[STATE_FILE]), f"{tree.label}/{STATE_FILE}"
        stored = _read_tensors(tree, manifest)
        model = {name.removeprefix(_MODEL): t for name, t in stored.items() if name.startswith(_MODEL)}
        limits = {name: model.pop(name) for name in [name for name in model if name.endswith(_RANGE)]}
        if WORD_EMBEDDINGS not in model or len(model[WORD_EMBEDDINGS].shape) != 2:
            raise UserError(f"{tree.label} holds no model.{WORD_EMBEDDINGS}: it is a checkpoint of another project")
        rows = model[WORD_EMBEDDINGS].shape[0]
        config = _config(run_state, label, model, rows)
        words = true_vocab_size(label, rows, config.vocab_size if CONFIG_KEY in run_state else None, options)
        config = _overridden(replace(config, vocab_size=words or rows), options)
        assumed = f"the number of words is not stored: all {rows} rows of the table were taken"
        optimizer = {name.removeprefix(_OPTIMIZER): t for name, t in stored.items() if name.startswith(_OPTIMIZER)}
        step, head = run_state.get("step"), run_state.get("head")
        return CanonicalState(
            config=config,
            facts=SourceFacts(
                format=self.name,
                variant="training checkpoint" if optimizer else "weights",
                files=sum(name.endswith(".distcp") for name in tree),
                iteration=step if type(step) is int else None,
                true_vocab_size=words,
                stored_rows=rows,
                assumptions=() if words is not None else (assumed,),
            ),
            tensors=without_padding(model, config),
            head=head if head in HEADS else head_of_parameters(model, like_roberta=config.like_roberta),
            ranges=_ranges(run_state, label, limits) if limits else None,
            task=_task(run_state),
            optimizer=without_padding(optimizer, config),
            run_state=run_state,
        )

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write a checkpoint that a run of any layout can start from; with an optimizer, one that it can resume."""
        if options.checkpoint_version is not None:
            raise UserError("--checkpoint-version is Megatron's: leave it out when converting --to native")
        rows = state.config.padded_vocab_size
        tensors = {_MODEL + name: _with_padding(name, tensor, rows) for name, tensor in state.items()}
        for name, tensor in state.optimizer.items():
            tensors[_OPTIMIZER + name] = _with_padding(name.partition(".")[2], tensor, rows)
        run_state = dict(state.run_state or {"step": 0, "consumed_samples": 0})
        run_state[CONFIG_KEY] = state.config.to_dict()
        run_state[HAS_MANIFEST] = MANIFEST_FILE
        if state.head is not None:
            run_state["head"] = state.head
        if state.task is not None and "settings" not in run_state:
            run_state[_TASK] = state.task
        if state.ranges is not None:
            limits = state.ranges.limits.items()
            tensors |= {f"{_MODEL}{name}{_RANGE}": StateTensor.held(torch.tensor(n), "(a range)") for name, n in limits}
            run_state |= {_QUANTIZATION: dict(state.ranges.settings), _ARITHMETIC: VERSION}
        sums = _write_tensors(target, tensors)
        write_text(target / STATE_FILE, json.dumps(run_state, indent=1))
        write_manifest(target, sums)


def _ranges(run_state: dict[str, Any], label: str, limits: dict[str, StateTensor]) -> Ranges:
    """The ranges of a quantized model; those that training has reached, or final ones."""
    stated = section(run_state, _QUANTIZATION) or section(run_state, "settings", _QUANTIZATION)
    if not stated:
        raise UserError(f"{label} does not say how its model was quantized: it is damaged")
    check_version(label, run_state.get(_ARITHMETIC, 1))
    how = {name: value for name, value in stated.items() if name not in ("calibration_steps", "report_steps")}
    found = {name.removesuffix(_RANGE): float(tensor.load()) for name, tensor in limits.items()}
    return Ranges(how, {name: limit for name, limit in found.items() if limit >= 0.0}, frozen=True)


def _task(run_state: dict[str, Any]) -> dict[str, Any] | None:
    """What the model is fine-tuned for, as ``task.json`` has it."""
    task, data = section(run_state, _TASK), section(run_state, "settings", "data")
    how = {name: data[name] for name in HOW_TO_READ if name in data}
    return {"columns": how, **task} if "settings" in task else None


def _config(run_state: dict[str, Any], label: str, model: dict[str, StateTensor], rows: int) -> MegatronBertConfig:
    """The encoder's configuration: as stored, or from the settings of the run."""
    stored, sizes = section(run_state, CONFIG_KEY), section(run_state, "settings", "model")
    values: dict[str, Any] = {"model_type": RobertaConfig.model_type} if _POST_NORM in model else {}
    if stored:
        values |= stored
        if not stored.get("id2label") and (classes := classes_of(model)) is not None:
            values["id2label"] = numbered_labels(classes)
    elif not sizes:
        raise UserError(f"{label} holds neither the configuration of an encoder nor the settings of a run")
    else:
        values |= {key: value for key, value in sizes.items() if value is not None and key in CONFIG_FIELDS}
        if type(hidden := values.get("hidden_size")) is int:
            values.setdefault("intermediate_size", 4 * hidden)
        values |= {"vocab_size": rows, "binary_head": "pair_head.classifier.weight" in model}
    config = config_from_dict(values, label)
    for key in _PLAIN:
        if getattr(config, key) != getattr(MegatronBertConfig, key):
            raise UserError(f"{label} sets {key}: only plain pretraining encoders can be converted")
    return config


#: Fields of the configuration that a run cannot change on the way.
CONFIG_FIELDS = (*SIZES, "vocab_size_multiple", "scaled_output_init", "binary_head")
#: Fields that make another model of it.
_PLAIN = ("position_embedding_type", "is_decoder", "add_cross_attention", "tie_word_embeddings", "pruned_heads")


def _overridden(config: MegatronBertConfig, options: ReadOptions) -> MegatronBertConfig:
    if options.gelu is not None:
        config = replace(config, hidden_act=GELU_NAMES[options.gelu])
    if options.layer_norm_eps is not None:
        config = replace(config, layer_norm_eps=options.layer_norm_eps)
    if options.num_attention_heads not in (None, config.num_attention_heads):
        raise UserError(
            f"--num-attention-heads is {options.num_attention_heads}, but the checkpoint says "
            f"{config.num_attention_heads}: leave it out"
        )
    return config


def _with_padding(name: str, tensor: StateTensor, rows: int) -> StateTensor:
    if name not in VOCABULARY_TENSORS or tensor.shape[0] == rows:
        return tensor
    return tensor.mapped(lambda values: pad_vocabulary(name, values, rows, bias=0.0), shape=(rows, *tensor.shape[1:]))


# ---------------------------------------------------------------- files of torch.distributed.checkpoint


def _read_tensors(tree: FileTree, manifest: Manifest | None) -> dict[str, StateTensor]:
    """The tensors of a directory, unread; they are compared with the checksums of a manifest as they are read.

    Raises:
        UserError: the metadata is damaged, asks to load something else than data, or speaks of files or blocks that are
            not there.
    """
    metadata = replace(tree[METADATA], label=f"{tree.label}/{METADATA}")
    tensors = read_metadata(metadata, PLAIN if tree.folder is None else LARGE)
    places: dict[str, FileRange] = {}
    for tensor in tensors.values():
        for block in tensor.blocks:
            if block.file not in tree:
                raise UserError(
                    f"{tree.label} lacks {brief(block.file)}, which holds {brief(tensor.name)}: copy all files of the "
                    "checkpoint"
                )
            if block.file not in places:
                places[block.file] = tree[block.file]
            places[block.file].part(block.start, block.length)  # which it must have
    return {
        name: StateTensor(
            tensor.shape, tensor.dtype, partial(_assemble, places, tensor, manifest), f"{tree.label}: {brief(name)}"
        )
        for name, tensor in tensors.items()
    }


def _assemble(places: Mapping[str, FileRange], tensor: BlockedTensor, manifest: Manifest | None) -> Tensor:
    whole: Tensor | None = None
    for block in tensor.blocks:
        if manifest is not None:
            manifest.check_range(block.file, block.start, block.length)
        place = places[block.file].part(block.start, block.length)
        values = read_block(place, tensor, block, (0,) * len(block.sizes), block.sizes)
        if block.sizes == tensor.shape:
            return values
        if whole is None:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        whole[tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes))] = values
    return torch.empty(tensor.shape, dtype=tensor.dtype) if whole is None else whole


def _write_tensors(target: Path, tensors: Mapping[str, StateTensor]) -> dict[str, FileSums]:
    """Write tensors into a folder as a run of one process does; returns what its files of tensors hold, by name."""
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    (plan,) = global_plans([local_plan(empty)])
    assert plan.file is not None
    assert plan.metadata is not None
    values = (bytes_of(tensors[name].load()) for name, _ in plan.blocks)
    descriptor = os.open(target / plan.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    sums = write_pieces(descriptor, zip(plan.pieces, values))
    (target / METADATA).write_bytes(plan.metadata)
    return {plan.file: sums}
