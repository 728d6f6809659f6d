# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints of MegatronBert, Bert, RoBERTa and I-BERT: config.json, safetensors or pytorch_model.bin."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface_config import architecture_in, class_ending, config_in, family_in, their_config
from megatron_bert.convert.huggingface_names import (
    IBERT,
    MEGATRON_BERT,
    WRAPPERS,
    HuggingFaceNames,
    family_of,
    fuse,
    separate,
)
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.ranges import RANGES_NAME, parse_ranges, their_buffers
from megatron_bert.convert.safetensors_files import read_safetensors, write_safetensors
from megatron_bert.convert.state import (
    QUERY_KEY_VALUE,
    VOCABULARY_BIAS,
    WORD_EMBEDDINGS,
    CanonicalState,
    SourceFacts,
    StateTensor,
    without_padding,
)
from megatron_bert.json_file import read_json
from megatron_bert.model.configuration import CONFIG_NAME, MODEL_TYPE, MegatronBertConfig
from megatron_bert.model.task_heads.table import head_of_class, head_of_parameters
from parallel.errors import UserError, brief
from parallel.stored.stored_tensor import StoredTensor
from parallel.whole_files import write_json, write_text

#: Where weights are looked for, the safer kind first.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: File beside a model that was fine-tuned here, which says for what.
TASK_NAME = "task.json"
#: What keys are read as: without what wrappers put before them, and norms of BERT's first files as transformers does.
_READ_AS = {WRAPPERS: "", r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
#: Parts of a tensor of ours, by their number.
_Parts = Mapping[int, StateTensor]


class HuggingFace:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "huggingface"
    entries = (
        r"config\.json|task\.json|quantization\.json|(?:model|pytorch_model)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
        r"|(?:model\.safetensors|pytorch_model\.bin)\.index\.json"
    )

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds a config.json and weights under their usual names."""
        return CONFIG_NAME in tree and any(name in tree for name in WEIGHTS)

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open the weights of any class of a family that is known."""
        stored, variant = open_weights(tree)
        return _read(tree, options, stored, variant)

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write config.json and safetensors for transformers' classes, and what is known of the task and the ranges."""
        if options.tensor * options.pipeline * options.virtual_stages > 1:
            raise UserError("--tensor, --pipeline and --virtual-stages divide Megatron's files: huggingface has none")
        if options.checkpoint_version is not None:
            raise UserError("--checkpoint-version is Megatron's: leave it out when converting --to huggingface")
        write_json(target / CONFIG_NAME, their_config(state))
        _write_weights(state, target, options.max_shard_bytes)
        if state.ranges is not None:
            write_text(target / RANGES_NAME, state.ranges.as_json())
        if state.task is not None:
            write_json(target / TASK_NAME, state.task)


def settings_alone(tree: FileTree) -> CanonicalState:
    """What a directory without weights says of its model: its configuration, head and task.

    Raises:
        UserError: there is no config.json, or it is damaged or of another kind of model.
    """
    if CONFIG_NAME not in tree:
        raise UserError(f"{tree.label} holds no {CONFIG_NAME}: copy all files of the model")
    return _read(tree, ReadOptions(), {}, "settings alone")


def _read(tree: FileTree, options: ReadOptions, stored: Mapping[str, StateTensor], variant: str) -> CanonicalState:
    settings, label = read_json(tree[CONFIG_NAME]), f"{tree.label}/{CONFIG_NAME}"
    family, assumed = family_in(settings, label, stored)
    _check_architecture(tree.label, family, stored)
    parts = _parts(tree.label, family, stored)
    table = _embeddings(tree.label, family, parts) if stored else None
    rows = None if table is None else table.shape[0]
    named = {name: next(iter(several.values())) for name, several in parts.items()}
    architecture, by_names = architecture_in(settings), head_of_parameters(named, like_roberta=family is IBERT)
    config, words, assumptions = config_in(settings, label, family, rows, named, options)
    warnings: list[str] = []
    ranges = None
    if RANGES_NAME in tree:
        ranges = parse_ranges(tree[RANGES_NAME].content(), tree[RANGES_NAME].label)
    elif settings.get("quant_mode") and (count := sum(family.is_range(key) for key in stored)):
        warnings.append(f"{count} buffers of transformers' quantized layers were left out: quantize the model again")
    facts = SourceFacts(
        format=HuggingFace.name,
        variant=variant,
        files=len({tensor.origin.rpartition(":")[0] for tensor in stored.values()}),
        true_vocab_size=words,
        stored_rows=config.vocab_size if rows is None else rows,
        assumptions=(*assumed, *assumptions),
        architecture=architecture,
    )
    return CanonicalState(
        config=config,
        facts=facts,
        tensors=without_padding(_canonical(tree.label, parts, config), config),
        head=by_names if architecture is None else head_of_class(architecture),
        ranges=ranges,
        task=read_json(tree[TASK_NAME]) if TASK_NAME in tree else None,
        warnings=warnings,
        label=tree.label,
    )


def open_weights(tree: FileTree) -> tuple[dict[str, StateTensor], str]:
    """The tensors of a folder by their usual names, and the file that says where they are.

    Raises:
        UserError: a file is damaged, missing, or holds something else.
    """
    name = next(name for name in WEIGHTS if name in tree)
    return {_usual(key): tensor for key, tensor in _open_files(tree, name).items()}, name


def _usual(key: str) -> str:
    for pattern, text in _READ_AS.items():
        key = re.sub(pattern, text, key)
    return key


def _open_files(tree: FileTree, name: str) -> dict[str, StateTensor]:
    if not name.endswith(".index.json"):
        return _open_file(tree, name)
    index = read_json(tree[name]).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{tree.label}/{name} holds no weight_map of names and files: fetch it again")
    found: dict[str, StateTensor] = {}
    for file in sorted(set(index.values())):
        if "/" in file or "\\" in file or file not in tree:
            raise UserError(f"{tree.label}/{name} names {brief(file)}, which is not beside it: copy all files")
        found |= _open_file(tree, file)
    return found


def _open_file(tree: FileTree, name: str) -> dict[str, StateTensor]:
    place = tree[name]
    if name.endswith(".safetensors"):
        return read_safetensors(place)
    content = tree.structure(name)
    if not isinstance(content, dict) or not all(isinstance(t, StoredTensor) for t in content.values()):
        raise UserError(f"{place.label} holds something else than tensors by name: give a state dictionary")
    return {
        str(key): StateTensor(tensor.shape, tensor.dtype, tensor.load, f"{place.label}: {brief(key)}")
        for key, tensor in content.items()
    }


# ---------------------------------------------------------------- tensors


def _check_architecture(label: str, family: HuggingFaceNames, stored: Mapping[str, StateTensor]) -> None:
    if family is MEGATRON_BERT and any(
        key.startswith("bert.embeddings.LayerNorm") or ".output.LayerNorm." in key for key in stored
    ):
        raise UserError(
            f"{label} holds norms behind the embeddings or layers: it is a post-layer-norm BERT, but its settings say "
            f"{MODEL_TYPE}, which normalizes before each layer: settings and weights are of two models"
        )
    if any("crossattention" in key for key in stored):
        raise UserError(f"{label} holds cross-attention: only encoders can be read")


def _parts(label: str, family: HuggingFaceNames, stored: Mapping[str, StateTensor]) -> dict[str, _Parts]:
    """Canonical name -> the tensors that make it up."""
    found: dict[str, dict[int, StateTensor]] = defaultdict(dict)
    for key, tensor in stored.items():
        if family.is_buffer(key):
            continue
        place = family.ours(key)
        if place is None:
            raise UserError(f"{label} holds {brief(key)}, which no {family.classes} class has: wrong file?")
        found[place.owner][place.part] = tensor
    return dict(found)


def _embeddings(label: str, family: HuggingFaceNames, parts: Mapping[str, _Parts]) -> StateTensor:
    if WORD_EMBEDDINGS in parts and len(parts[WORD_EMBEDDINGS][0].shape) == 2:
        return parts[WORD_EMBEDDINGS][0]
    raise UserError(f"{label} holds no {family.theirs(WORD_EMBEDDINGS)[0]}: it is not a whole {family.classes} model")


def _canonical(label: str, parts: Mapping[str, _Parts], config: MegatronBertConfig) -> dict[str, StateTensor]:
    tensors = {
        name: _fused(label, name, several, config) if QUERY_KEY_VALUE in name else several[0]
        for name, several in parts.items()
    }
    for name, kind in ((WORD_EMBEDDINGS, "weight"), (VOCABULARY_BIAS, "bias")):
        copy = tensors.pop(f"output_embeddings.{kind}", None)
        if copy is not None and name == VOCABULARY_BIAS and name not in tensors:
            tensors[name] = copy
        elif copy is not None and VOCABULARY_BIAS in tensors:
            # With the head and not with the table, which serves without it too.
            tensors[VOCABULARY_BIAS] = _checked_copy(tensors[VOCABULARY_BIAS], tensors[name], copy)
    return tensors


def _fused(label: str, name: str, parts: _Parts, config: MegatronBertConfig) -> StateTensor:
    if set(parts) != {0, 1, 2}:
        raise UserError(f"{label} holds only {len(parts)} of query, key and value for {name}: it is damaged")
    query, key, value = (parts[index] for index in range(3))
    expected = (config.hidden_size, config.hidden_size)[: 2 if name.endswith("weight") else 1]
    for part in (query, key, value):
        part.expect(expected, "the sizes of the model make it", "settings and weights are of two models")
        if part.dtype != query.dtype:
            raise UserError(
                f"{part.origin} holds {part.dtype} values, but {query.origin} {query.dtype}: they are of two models"
            )

    def load() -> Tensor:
        return fuse([query.load(), key.load(), value.load()], config.head_dim)

    return StateTensor((3 * expected[0], *expected[1:]), query.dtype, load, query.origin)


def _checked_copy(tensor: StateTensor, original: StateTensor, copy: StateTensor) -> StateTensor:
    def check(values: Tensor) -> Tensor:
        if not original.load().equal(copy.load()):
            raise UserError(
                f"{copy.origin} differs from {original.origin}, whose copy it should be: a masked-language head whose "
                "output matrix is not tied cannot be taken over"
            )
        return values

    return tensor.mapped(check)


def _write_weights(state: CanonicalState, target: Path, limit: int) -> None:
    """One safetensors file, or several with an index."""
    from huggingface_hub import split_state_dict_into_shards_factory  # here: a tenth of the time a command starts in

    family, buffers = family_of(state.config), dict[str, StateTensor]()
    if family is IBERT and state.ranges is not None:
        found = their_buffers(state.ranges.limits)
        buffers = {f"{family.prefix}.{key}": StateTensor.held(values, key) for key, values in found.items()}
    cut = f"{family.prefix}." if class_ending(state) == "Model" else ""
    tensors = {**state, **buffers}
    keys = {name: [name] if name in buffers else list(family.theirs(name)) for name in tensors}
    keys = {name: [key.removeprefix(cut) for key in several] for name, several in keys.items()}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for file, names in split.filename_to_tensors.items():
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in names:
            rows, *others = tensors[name].shape
            layout |= dict.fromkeys(keys[name], ((rows // len(keys[name]), *others), tensors[name].dtype))
        parts = (separate(tensors[name].load(), len(keys[name]), state.config.head_dim) for name in names)
        write_safetensors(target / file, layout, chain.from_iterable(parts))
    if split.is_sharded:
        weight_map = {key: file for name, file in split.tensor_to_filename.items() for key in keys[name]}
        write_json(target / f"{WEIGHTS[0]}.index.json", {"metadata": split.metadata, "weight_map": weight_map})
