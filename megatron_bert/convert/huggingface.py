# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints of MegatronBert, Bert, RoBERTa and I-BERT: config.json, safetensors or pytorch_model.bin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert.families import MEGATRON, MODEL_TYPES, ROBERTA, Family, family_of
from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface_names import WRAPPERS, fuse, separate
from megatron_bert.convert.megatron_config import true_vocab_size
from megatron_bert.convert.megatron_state import trimmed
from megatron_bert.convert.options import GELU_NAMES, ReadOptions, WriteOptions
from megatron_bert.convert.ranges import RANGES_NAME, parse_ranges, their_buffers
from megatron_bert.convert.safetensors_files import SafetensorsWriter, read_safetensors
from megatron_bert.convert.state import (
    QUERY_KEY_VALUE,
    SIZES,
    VOCABULARY_BIAS,
    VOCABULARY_TENSORS,
    WORD_EMBEDDINGS,
    CanonicalState,
    SourceFacts,
    StateTensor,
    classes_of,
)
from megatron_bert.json_file import read_json
from megatron_bert.model.activations import GELU_SYNONYMS
from megatron_bert.model.configuration import (
    CONFIG_NAME,
    MODEL_TYPE,
    MegatronBertConfig,
    config_from_dict,
    named_labels,
)
from megatron_bert.model.task_heads.table import HEADS, head_of_class, head_of_parameters
from parallel.errors import UserError, brief
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.torch_files import load_torch_file
from parallel.whole_files import write_json, write_text

#: Where weights are looked for, the safer kind first.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Fields of a config.json without which nothing is known of a model.
_NEEDED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)
_OF_HEADS = ("classifier_dropout", "problem_type")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
#: File beside a model that was fine-tuned here, which says for what.
TASK_NAME = "task.json"


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
        settings, label = read_json(tree[CONFIG_NAME]), f"{tree.label}/{CONFIG_NAME}"
        stored, variant = open_weights(tree)
        family, assumed = _family(settings, label, stored)
        _check_architecture(tree.label, family, stored)
        table = _embeddings(tree.label, family, stored)
        named = {family.names.ours(key) or key: tensor for key, tensor in stored.items()}
        head = _head(settings, named, family)
        config, words, assumptions = _config(settings, label, family, table.shape[0], named, options)
        warnings: list[str] = []
        tensors = _canonical(tree.label, stored, family, config)
        for name in VOCABULARY_TENSORS & tensors.keys():
            tensors[name] = trimmed(tensors[name], config.vocab_size)
        ranges = None
        if RANGES_NAME in tree:
            ranges = parse_ranges(bytes(tree[RANGES_NAME].read(0, tree[RANGES_NAME].length)), tree[RANGES_NAME].label)
        elif count := sum(family.names.is_range(key) for key in stored):
            warnings.append(
                f"{count} buffers of transformers' quantized layers were left out: quantize the model again"
            )
        facts = SourceFacts(
            format=self.name,
            variant=variant,
            files=len({tensor.origin.rpartition(":")[0] for tensor in stored.values()}),
            true_vocab_size=words,
            stored_rows=table.shape[0],
            assumptions=(*assumed, *assumptions),
            architecture=_architecture(settings),
        )
        task = read_json(tree[TASK_NAME]) if TASK_NAME in tree else None
        return CanonicalState(
            config=config, facts=facts, tensors=tensors, head=head, ranges=ranges, task=task, warnings=warnings
        )

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write config.json and safetensors for transformers' classes, and what is known of the task and the ranges."""
        if options.tensor * options.pipeline * options.virtual_stages > 1:
            raise UserError("--tensor, --pipeline and --virtual-stages divide Megatron's files: huggingface has none")
        if options.checkpoint_version is not None:
            raise UserError("--checkpoint-version is Megatron's: leave it out when converting --to huggingface")
        write_json(target / CONFIG_NAME, _their_config(state))
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
    settings, label = read_json(tree[CONFIG_NAME]), f"{tree.label}/{CONFIG_NAME}"
    family, _ = _family(settings, label, {})
    config, words, _ = _config(settings, label, family, None, {}, ReadOptions())
    facts = SourceFacts(
        format=HuggingFace.name,
        variant="settings alone",
        files=0,
        true_vocab_size=words,
        stored_rows=config.vocab_size,
        architecture=_architecture(settings),
    )
    task = read_json(tree[TASK_NAME]) if TASK_NAME in tree else None
    head = _head(settings, {}, family)
    return CanonicalState(config=config, facts=facts, tensors={}, head=head, task=task, label=tree.label)


# ---------------------------------------------------------------- weights


def open_weights(tree: FileTree) -> tuple[dict[str, StateTensor], str]:
    """The tensors of a folder by name, without what wrappers put before it, and the file that says where they are.

    Raises:
        UserError: a file is damaged, missing, or holds something else.
    """
    name = next(name for name in WEIGHTS if name in tree)
    return {re.sub(WRAPPERS, "", key): tensor for key, tensor in _open_files(tree, name).items()}, name


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
    content = load_torch_file(place)
    if not isinstance(content, dict) or not all(isinstance(t, StoredTensor) for t in content.values()):
        raise UserError(f"{place.label} holds something else than tensors by name: give a state dictionary")
    return {
        str(key): StateTensor(tensor.shape, tensor.dtype, tensor.load, f"{place.label}: {brief(key)}")
        for key, tensor in content.items()
    }


# ---------------------------------------------------------------- what kind of model it is


def _family(settings: dict[str, Any], label: str, stored: Mapping[str, StateTensor]) -> tuple[Family, list[str]]:
    """The family that the settings name, where it is an encoder of a kind that is read; and what was assumed for it."""
    kind, assumed = settings.get("model_type"), []
    if kind is None and any(".attention.ln." in key for key in stored):
        kind = MODEL_TYPE
        assumed.append(f"{label} gives no model_type: {MODEL_TYPE} was taken, for the norms that its weights have")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        given = "gives no model_type" if kind is None else f"has model_type {brief(kind)!r}"
        raise UserError(
            f"{label} {given}: expected {MODEL_TYPE}, {', '.join(sorted(MODEL_TYPES.keys() - {MODEL_TYPE}))}"
        )
    if settings.get("position_embedding_type") not in (None, "absolute"):
        raise UserError(
            f"{label} has relative position embeddings (position_embedding_type "
            f"{brief(settings['position_embedding_type'])}): only absolute ones can be read"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if settings.get(name):
            raise UserError(f"{label} is of a decoder ({name}): only encoders can be read")
    if settings.get("pruned_heads"):
        raise UserError(f"{label} says that attention heads were pruned: only whole models can be read")
    return MODEL_TYPES[kind], assumed


def _check_architecture(label: str, family: Family, stored: Mapping[str, StateTensor]) -> None:
    if family is MEGATRON and any(
        key.startswith("bert.embeddings.LayerNorm") or ".output.LayerNorm." in key for key in stored
    ):
        raise UserError(
            f"{label} holds norms behind the embeddings or layers: it is a post-layer-norm BERT, but its settings say "
            f"{MODEL_TYPE}, which normalizes before each layer: settings and weights are of two models"
        )
    if any("crossattention" in key for key in stored):
        raise UserError(f"{label} holds cross-attention: only encoders can be read")


def _embeddings(label: str, family: Family, stored: Mapping[str, StateTensor]) -> StateTensor:
    for key, tensor in stored.items():
        if family.names.ours(key) == WORD_EMBEDDINGS and len(tensor.shape) == 2:
            return tensor
    raise UserError(
        f"{label} holds no {family.names.theirs(WORD_EMBEDDINGS)[0]}: it is not a whole {family.classes} model"
    )


def _head(settings: dict[str, Any], names: Mapping[str, StateTensor], family: Family) -> str | None:
    """The kind of head that the class has which the settings name, or else the weights."""
    if (named := _architecture(settings)) is not None:
        return head_of_class(named)
    return head_of_parameters(names, like_roberta=family is ROBERTA)


def _architecture(settings: dict[str, Any]) -> str | None:
    named = settings.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


# ---------------------------------------------------------------- settings


def _config(
    settings: dict[str, Any],
    label: str,
    family: Family,
    rows: int | None,
    named: Mapping[str, StateTensor],
    options: ReadOptions,
) -> tuple[MegatronBertConfig, int | None, list[str]]:
    if missing := [name for name in _NEEDED if settings.get(name) is None]:
        raise UserError(f"{label} gives no {missing[0]}: it is damaged or of another kind of model")
    values = {name: settings[name] for name in (*SIZES, *_OF_HEADS) if settings.get(name) is not None}
    if rows not in (None, values["vocab_size"]):
        raise UserError(
            f"{label} says vocab_size {brief(repr(values['vocab_size']))}, but there are {rows} rows of word "
            "embeddings: settings and weights are of two models"
        )
    words = None if rows is None else true_vocab_size(label, rows, None, options)
    activation = GELU_NAMES[options.gelu] if options.gelu else brief(values.get("hidden_act", "gelu"), 40)
    values |= {
        "model_type": family.config.model_type,
        "vocab_size": words or values["vocab_size"],
        "num_attention_heads": options.num_attention_heads or values["num_attention_heads"],
        "layer_norm_eps": options.layer_norm_eps or values.get("layer_norm_eps", 1e-12),
        "hidden_act": GELU_SYNONYMS.get(activation, activation),
        "binary_head": "pair_head.classifier.weight" in named,
        "id2label": _classes(settings, label, named),
    }
    values |= {key: _token(settings, key, values["vocab_size"], family.config) for key in _TOKENS}
    config = config_from_dict(values, label)
    assumptions = []
    if config.layer_norm_eps == 1e-12 and family is MEGATRON:
        assumptions.append(
            "the stored layer_norm_eps 1e-12 is the default of transformers, whose converter never set Megatron's "
            "1e-5: give --layer-norm-eps 1e-5 if the model was trained by Megatron"
        )
    return config, words, assumptions


def _token(settings: dict[str, Any], key: str, words: Any, family: type[MegatronBertConfig]) -> Any:
    usual = getattr(family, key)
    value = settings.get(key, usual)
    ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
    known = all(type(number) is int and type(words) is int and 0 <= number < words for number in ids)
    return value if value is None or (ids and known) else usual


def _classes(settings: dict[str, Any], label: str, named: Mapping[str, StateTensor]) -> dict[int, str]:
    """The names of classes; their number by the weights where the settings say nothing of them."""
    by_number, by_name = settings.get("id2label"), settings.get("label2id")
    count = None if by_number or by_name else classes_of(named)
    try:
        return named_labels(by_number, by_name, count)
    except UserError as error:
        raise UserError(f"id2label in {label} is damaged ({brief(error, 200)}): copy the model again") from None


def _their_config(state: CanonicalState) -> dict[str, Any]:
    config, family = state.config, family_of(state.config)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    classes: dict[str, Any] = {}
    if state.head is not None:
        classes = {
            "id2label": {str(number): name for number, name in (config.id2label or {}).items()},
            "label2id": {name: number for number, name in (config.id2label or {}).items()},
            "problem_type": config.problem_type,
            "classifier_dropout": config.classifier_dropout,
        }
    quantized = {}
    if family is ROBERTA and state.ranges is not None:
        quantized = {"quant_mode": True, "force_dequant": state.ranges.settings.get("force_dequant", "none")}
    return {
        "architectures": [family.classes + _class_ending(state)],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SIZES},
        **{name: value for name in ("bos_token_id", "eos_token_id") if (value := getattr(config, name)) is not None},
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **classes,
        **quantized,
        **({"torch_dtype": dtypes.pop()} if len(dtypes) == 1 else {}),
    }


def _class_ending(state: CanonicalState) -> str:
    """What the name of the class ends in that has just these weights."""
    if state.head is not None:
        return HEADS[state.head].class_ending
    if state.has_masked_head:
        return "ForPreTraining" if state.has_pair_head else "ForMaskedLM"
    return "ForNextSentencePrediction" if state.has_pair_head else "Model"


# ---------------------------------------------------------------- tensors


def _canonical(
    label: str, stored: Mapping[str, StateTensor], family: Family, config: MegatronBertConfig
) -> dict[str, StateTensor]:
    tensors: dict[str, StateTensor] = {}
    projections: dict[str, dict[int, StateTensor]] = {}
    for key, tensor in stored.items():
        if family.names.is_buffer(key) or key in family.names.copies:
            continue
        name = family.names.ours(key)
        if name is None:
            raise UserError(f"{label} holds {brief(key)}, which no {family.classes} class has: wrong file?")
        if QUERY_KEY_VALUE in name:
            place = family.names.place(key.rpartition(".")[0])
            projections.setdefault(name, {})[0 if place is None else place.part] = tensor
        else:
            tensors[name] = tensor
    for name, parts in projections.items():
        tensors[name] = _fused(label, name, parts, config)
    for key, name in family.names.copies.items():
        if key in stored and name not in tensors and name == VOCABULARY_BIAS:
            tensors[name] = stored[key]
        elif key in stored and VOCABULARY_BIAS in tensors:
            # With the head and not with the table, which serves without it too.
            tensors[VOCABULARY_BIAS] = _checked_copy(tensors[VOCABULARY_BIAS], tensors[name], stored[key])
    return tensors


def _fused(label: str, name: str, parts: dict[int, StateTensor], config: MegatronBertConfig) -> StateTensor:
    if set(parts) != {0, 1, 2}:
        raise UserError(f"{label} holds only {len(parts)} of query, key and value for {name}: it is damaged")
    query, key, value = (parts[index] for index in range(3))
    expected = (config.hidden_size, config.hidden_size)[: 2 if name.endswith("weight") else 1]
    for part in (query, key, value):
        if part.shape != expected:
            raise UserError(
                f"{part.origin} has shape {list(part.shape)}, but the sizes of the model make it {list(expected)}: "
                "settings and weights are of two models"
            )
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
    names = family_of(state.config).names
    cut = f"{names.prefix}." if _class_ending(state) == "Model" else ""
    shards: list[dict[str, tuple[str, ...]]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tuple(theirs.removeprefix(cut) for theirs in names.theirs(name))
        size += tensor.nbytes
    buffers: dict[str, Tensor] = {}
    if family_of(state.config) is ROBERTA and state.ranges is not None:
        found = their_buffers(state.ranges.limits)
        buffers = {f"{names.prefix}.{key}".removeprefix(cut): values for key, values in found.items()}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, keys in shard.items():
            shape = state[name].shape
            layout |= dict.fromkeys(keys, ((shape[0] // len(keys), *shape[1:]), state[name].dtype))
        beside = buffers if number == len(shards) else {}
        layout |= {key: (tuple(values.shape), values.dtype) for key, values in beside.items()}
        with SafetensorsWriter(target / file, layout) as writer:
            for name, keys in shard.items():
                parts = separate(state[name].load(), len(keys), state.config.head_dim)
                for theirs, part_values in zip(keys, parts):
                    writer.write(theirs, part_values)
            for key, values in beside.items():
                writer.write(key, values)
        weight_map |= dict.fromkeys(layout, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)
