"""Hugging Face checkpoints of MegatronBert: config.json and safetensors, or a pytorch_model.bin."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface_names import fuse, our_name, projection_of, separate, their_names
from megatron_bert.convert.json_files import fraction, integer, read_json
from megatron_bert.convert.megatron_config import true_vocab_size
from megatron_bert.convert.megatron_state import trimmed
from megatron_bert.convert.options import GELU_NAMES, ReadOptions, WriteOptions
from megatron_bert.convert.progress import Progress
from megatron_bert.convert.safetensors_files import SafetensorsWriter, read_safetensors
from megatron_bert.convert.state import (
    QUERY_KEY_VALUE,
    TASK_HEADS,
    VOCABULARY_TENSORS,
    WORD_EMBEDDINGS,
    CanonicalState,
    SourceFacts,
    StateTensor,
)
from megatron_bert.model.activations import GELU_SYNONYMS
from megatron_bert.model.configuration import MODEL_TYPE, MegatronBertConfig
from parallel.errors import UserError, brief
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.torch_files import load_torch_file

CONFIG_NAME = "config.json"
#: Where weights are looked for, the safer kind first.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: File of a quantized model's ranges.
_RANGES = "quantization.json"
#: Copies of other tensors, and buffers.
_COPIES = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "masked_head.bias",
}
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


class HuggingFace:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "huggingface"
    entries = (
        r"config\.json|(?:model|pytorch_model)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
        r"|(?:model\.safetensors|pytorch_model\.bin)\.index\.json"
    )

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds a config.json and weights under their usual names."""
        return CONFIG_NAME in tree and any(name in tree for name in WEIGHTS)

    def read(self, tree: FileTree, options: ReadOptions, stack: ExitStack) -> CanonicalState:
        """Open the weights of any MegatronBert class."""
        del stack
        settings, label = read_json(tree[CONFIG_NAME]), f"{tree.label}/{CONFIG_NAME}"
        stored, variant = open_weights(tree)
        stored = {key if key.startswith(("bert.", "cls.")) else _prefixed(key): t for key, t in stored.items()}
        assumed = _check_kind(settings, label, stored)
        _check_architecture(tree.label, stored)
        config, words, assumptions = _config(settings, label, stored, options)
        assumptions = assumed + assumptions
        warnings: list[str] = []
        tensors = _canonical(tree.label, stored, config, warnings)
        if _RANGES in tree:
            warnings.append(
                f"{tree.label} is a quantized model: its {_RANGES} was left out, and what remains computes in floating "
                "point (`megatron-bert export --to integer` keeps its integers)"
            )
        for name in VOCABULARY_TENSORS & tensors.keys():
            tensors[name] = trimmed(tensors[name], config.vocab_size)
        facts = SourceFacts(
            format=self.name,
            variant=variant,
            files=len({tensor.origin.rpartition(":")[0] for tensor in stored.values()}),
            true_vocab_size=words,
            stored_rows=stored["bert." + WORD_EMBEDDINGS].shape[0],
            assumptions=tuple(assumptions),
        )
        return CanonicalState(config=config, facts=facts, tensors=tensors, warnings=warnings)

    def write(self, state: CanonicalState, target: Path, options: WriteOptions, progress: Progress) -> None:
        """Write config.json and safetensors for transformers' MegatronBert classes."""
        if options.tensor * options.pipeline * options.virtual_stages > 1:
            raise UserError("--tensor, --pipeline and --virtual-stages divide Megatron's files: huggingface has none")
        if options.checkpoint_version is not None:
            raise UserError("--checkpoint-version is Megatron's: leave it out when converting --to huggingface")
        config = _their_config(state)
        (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_weights(state, target, options.max_shard_bytes, progress)


def _prefixed(key: str) -> str:
    """Keys of the bare encoder class, as those of the others."""
    return f"bert.{key}" if key.split(".")[0] in ("embeddings", "encoder", "pooler") else key


def _check_kind(settings: dict[str, Any], label: str, stored: dict[str, StateTensor]) -> list[str]:
    """Check that the settings are of an encoder of this kind; what had to be assumed for it."""
    kind, assumed = settings.get("model_type"), []
    if kind is None and any(".attention.ln." in key for key in stored):
        kind = MODEL_TYPE
        assumed.append(f"{label} gives no model_type: {MODEL_TYPE} was taken, for the norms that its weights have")
    if kind == MODEL_TYPE:
        if settings.get("position_embedding_type") not in (None, "absolute"):
            raise UserError(f"{label} has relative position embeddings: only absolute ones can be converted")
        if settings.get("is_decoder") or settings.get("add_cross_attention"):
            raise UserError(f"{label} is of a decoder: only encoders can be converted")
        return assumed
    if kind in ("bert", "roberta", "xlm-roberta", "electra", "ibert"):
        serves = kind in ("roberta", "xlm-roberta", "ibert")
        also = " (finetune and quantize take this one as it is)" if serves else ""
        raise UserError(
            f"{label} is of a {kind} model, which normalises after each sum (post-layer-norm); Megatron's normalises "
            f"before each layer, so its weights would compute something else: use a megatron-bert model{also}"
        )
    given = "gives no model_type" if kind is None else f"has model_type {brief(kind)!r}"
    raise UserError(f"{label} {given}: expected {MODEL_TYPE}")


def open_weights(tree: FileTree) -> tuple[dict[str, StateTensor], str]:
    """The tensors of a folder under their own names, unread, and the file that says where they are.

    Raises:
        UserError: a file is damaged, missing, or holds something else.
    """
    name = next(name for name in WEIGHTS if name in tree)
    if not name.endswith(".index.json"):
        return _open_file(tree, name), name
    index = read_json(tree[name]).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{tree.label}/{name} holds no weight_map of names and files: fetch it again")
    found: dict[str, StateTensor] = {}
    for file in sorted(set(index.values())):
        if "/" in file or "\\" in file or file not in tree:
            raise UserError(f"{tree.label}/{name} names {brief(file)}, which is not beside it: copy all files")
        found |= _open_file(tree, file)
    return found, name


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


def _check_architecture(label: str, stored: dict[str, StateTensor]) -> None:
    if any(key.startswith("bert.embeddings.LayerNorm") or ".output.LayerNorm." in key for key in stored):
        raise UserError(
            f"{label} holds norms behind the embeddings or layers: it is a post-layer-norm BERT, which Megatron's "
            "pre-layer-norm model cannot compute; use a megatron-bert model"
        )
    if any("crossattention" in key for key in stored):
        raise UserError(f"{label} holds cross-attention: only encoders can be converted")
    if "bert." + WORD_EMBEDDINGS not in stored:
        raise UserError(f"{label} holds no bert.embeddings.word_embeddings.weight: it is no whole MegatronBert model")


def _config(
    settings: dict[str, Any], label: str, stored: dict[str, StateTensor], options: ReadOptions
) -> tuple[MegatronBertConfig, int | None, list[str]]:
    rows = stored["bert." + WORD_EMBEDDINGS].shape[0]
    if integer(settings, "vocab_size", label) != rows:
        raise UserError(
            f"{label} says vocab_size {settings['vocab_size']}, but there are {rows} rows of word embeddings: "
            "settings and weights are of two models"
        )
    words = true_vocab_size(label, rows, None, options)
    eps = options.layer_norm_eps or fraction(settings, "layer_norm_eps", label, 1e-12)
    assumptions = []
    if eps == 1e-12:
        assumptions.append(
            "the stored layer_norm_eps 1e-12 is the default of transformers, whose converter never set Megatron's "
            "1e-5: give --layer-norm-eps 1e-5 if the model was trained by Megatron"
        )
    activation = GELU_NAMES[options.gelu] if options.gelu else settings.get("hidden_act", "gelu")
    activation = brief(activation, 40)
    pad = settings.get("pad_token_id", 0)
    config = MegatronBertConfig(
        vocab_size=words or rows,
        hidden_size=integer(settings, "hidden_size", label),
        num_hidden_layers=integer(settings, "num_hidden_layers", label),
        num_attention_heads=options.num_attention_heads or integer(settings, "num_attention_heads", label),
        intermediate_size=integer(settings, "intermediate_size", label),
        hidden_act=GELU_SYNONYMS.get(activation, activation),
        hidden_dropout_prob=fraction(settings, "hidden_dropout_prob", label, 0.1),
        attention_probs_dropout_prob=fraction(settings, "attention_probs_dropout_prob", label, 0.1),
        max_position_embeddings=integer(settings, "max_position_embeddings", label),
        type_vocab_size=integer(settings, "type_vocab_size", label, 2),
        initializer_range=fraction(settings, "initializer_range", label, 0.02),
        layer_norm_eps=eps,
        pad_token_id=pad if pad is None or (type(pad) is int and 0 <= pad < (words or rows)) else 0,
        binary_head="cls.seq_relationship.weight" in stored,
    )
    return config, words, assumptions


def _canonical(
    label: str, stored: dict[str, StateTensor], config: MegatronBertConfig, warnings: list[str]
) -> dict[str, StateTensor]:
    tensors: dict[str, StateTensor] = {}
    projections: dict[str, dict[int, StateTensor]] = {}
    for key, tensor in stored.items():
        if key in _BUFFERS or key in _COPIES:
            continue
        if key.startswith(TASK_HEADS):
            warnings.append(f"{key} was left out: it is no part of a pretraining model")
            continue
        name = our_name(key)
        if name is None:
            raise UserError(f"{label} holds {brief(key)}, which no MegatronBert class has: wrong file?")
        if QUERY_KEY_VALUE in name:
            projections.setdefault(name, {})[projection_of(key)] = tensor
        else:
            tensors[name] = tensor
    for name, parts in projections.items():
        tensors[name] = _fused(label, name, parts, config)
    for key, name in _COPIES.items():
        if key in stored and name in tensors:
            tensors[name] = _checked_copy(tensors[name], stored[key])
    return tensors


def _fused(label: str, name: str, parts: dict[int, StateTensor], config: MegatronBertConfig) -> StateTensor:
    if set(parts) != {0, 1, 2}:
        raise UserError(f"{label} holds only {len(parts)} of query, key and value for {name}: it is damaged")
    query, key, value = (parts[index] for index in range(3))
    expected = (config.hidden_size, config.hidden_size)[: 2 if name.endswith("weight") else 1]
    for part in (query, key, value):
        if part.shape != expected or part.dtype != query.dtype:
            raise UserError(
                f"{part.origin} is {list(part.shape)} {part.dtype}, expected {list(expected)} {query.dtype}: "
                "settings and weights are of two models"
            )

    def load() -> Tensor:
        return fuse(query.load(), key.load(), value.load(), config.num_attention_heads)

    return StateTensor((3 * expected[0], *expected[1:]), query.dtype, load, query.origin)


def _checked_copy(tensor: StateTensor, copy: StateTensor) -> StateTensor:
    def check(values: Tensor) -> Tensor:
        if not values.equal(copy.load()):
            raise UserError(
                f"{copy.origin} differs from {tensor.origin}, whose copy it should be: a model whose output matrix is "
                "not tied cannot be converted"
            )
        return values

    return tensor.mapped(check)


def _their_config(state: CanonicalState) -> dict[str, Any]:
    config = state.config
    if state.has_masked_head:
        architecture = "MegatronBertForPreTraining" if state.has_pair_head else "MegatronBertForMaskedLM"
    else:
        architecture = "MegatronBertModel"
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **({"torch_dtype": dtypes.pop()} if len(dtypes) == 1 else {}),
    }


def _write_weights(state: CanonicalState, target: Path, limit: int, progress: Progress) -> None:
    """One safetensors file, or several with an index."""
    # A class without a masked-language head is the bare encoder, whose names have no `bert.` in front.
    cut = "" if state.has_masked_head else "bert."
    shards: list[dict[str, tuple[str, ...]]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tuple(theirs.removeprefix(cut) for theirs in their_names(name))
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, names in shard.items():
            shape = state[name].shape
            part = (shape[0] // len(names), *shape[1:])
            layout |= dict.fromkeys(names, (part, state[name].dtype))
        with SafetensorsWriter(target / file, layout) as writer:
            for name, names in shard.items():
                parts = separate(name, state[name].load(), state.config.num_attention_heads)
                for theirs, part_values in zip(names, parts):
                    writer.write(theirs, part_values)
                progress.advance(state[name].nbytes)
        weight_map |= dict.fromkeys(layout, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
