# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's own checkpoints of BERT, from the first (2019) to the last of its classic model code (2026).

The same model was saved under three generations of names: ``transformer`` with ``attention`` and ``layernorm``; from
2021 ``encoder`` with ``self_attention``; from 2023 with ``input_norm``, ``post_attention_norm``, ``final_norm``. Layers
are numbered from 0 in every pipeline stage. The order of query, key and value rows is that of the checkpoint version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.megatron_shards import first_keys, flat_tensors, locate, open_shards
from megatron_bert.convert.megatron_state import TASK_HEAD, TIED, read_state
from megatron_bert.convert.megatron_writer import MEGATRON_ENTRIES, MegatronNames, task_head, write_megatron
from megatron_bert.convert.nemo import NEMO_SETTINGS
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.progress import Progress
from megatron_bert.convert.query_key_value import check_version
from megatron_bert.convert.state import CanonicalState
from megatron_bert.model.task_heads.table import of_head
from parallel.errors import UserError

_EMBEDDINGS = {
    "word_embeddings": "embeddings.word_embeddings.weight",
    "position_embeddings": "embeddings.position_embeddings.weight",
    "tokentype_embeddings": "embeddings.token_type_embeddings.weight",
}
#: Parts of a layer by canonical name; readers take `self_attention` and `_norm` for the older spellings.
_LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.output": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.intermediate": "mlp.dense_h_to_4h",
    "mlp.output": "mlp.dense_4h_to_h",
}
_PART_NAMES = {theirs: ours for ours, theirs in _LAYER_PARTS.items()}
_HEADS = {
    "final_layernorm": "encoder.final_norm",
    "lm_head.dense": "masked_head.dense",
    "lm_head.layernorm": "masked_head.norm",
    "pooler.dense": "pair_head.pooler",
    "binary_head": "pair_head.classifier",
}
_PREFIX = re.compile(r"(?:(?:model|module)\.)*(?:language_model\.)?")
_LAYER = re.compile(r"(?:(?:transformer|encoder)\.)?layers\.(\d{1,6})\.(.+)\.(weight|bias)")
_TABLE = re.compile(r"(?:embedding\.)?(word|position|tokentype)_embeddings\.weight")


def canonical_name(key: str) -> str | None:
    """The canonical name of a key, of any generation."""
    key = _PREFIX.sub("", key, count=1)
    if (table := _TABLE.fullmatch(key)) is not None:
        return _EMBEDDINGS[f"{table[1]}_embeddings"]
    if (layer := _LAYER.fullmatch(key)) is not None:
        part = layer[2].replace("self_attention.", "attention.")
        part = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}.get(part, part)
        return f"encoder.layers.{layer[1]}.{_PART_NAMES[part]}.{layer[3]}" if part in _PART_NAMES else None
    if key == "word_embeddings_for_head.weight":
        return TIED
    if key == "lm_head.bias":
        return "masked_head.bias"
    if (head := TASK_HEAD.fullmatch(key)) is not None:
        return f"classifier.{head[1]}"
    owner, _, kind = key.removeprefix("transformer.").removeprefix("encoder.").rpartition(".")
    owner = {"final_norm": "final_layernorm", "lm_head.norm": "lm_head.layernorm"}.get(owner, owner)
    return f"{_HEADS[owner]}.{kind}" if owner in _HEADS and kind in ("weight", "bias") else None


class _Names(MegatronNames):
    """Names of the first generation, or of the second, for checkpoints of version 3.0."""

    def __init__(self, version: float, task_head: str) -> None:
        self._task_head = task_head
        modern = version == 3.0
        self._stack = "encoder" if modern else "transformer"
        self._attention = "self_attention" if modern else "attention"

    def path(self, name: str) -> tuple[str, ...]:
        owner, _, kind = name.rpartition(".")
        if name.startswith("embeddings."):
            table = next(theirs for theirs, ours in _EMBEDDINGS.items() if ours == name)
            return "language_model", "embedding", table, kind
        if name == "masked_head.bias":
            return "lm_head", "bias"
        if owner == "classifier":
            return self._task_head, kind
        if owner.startswith("encoder.layers."):
            _, _, number, part = owner.split(".", 3)
            theirs = _LAYER_PARTS[part].replace("attention.", self._attention + ".", 1)
            return "language_model", self._stack, f"layers.{number}.{theirs}.{kind}"
        theirs = next(theirs for theirs, ours in _HEADS.items() if ours == owner)
        if theirs == "final_layernorm":
            return "language_model", self._stack, f"{theirs}.{kind}"
        if theirs == "pooler.dense":
            return "language_model", "pooler", f"dense.{kind}"
        if theirs == "binary_head":
            return "binary_head", kind
        return "lm_head", f"{theirs.removeprefix('lm_head.')}.{kind}"

    def tied_path(self) -> tuple[str, ...]:
        return "word_embeddings_for_head", "weight"


class MegatronLegacy:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "megatron"
    entries = MEGATRON_ENTRIES

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds shards with the names of Megatron's classic model code."""
        return any((name := canonical_name(key)) and not of_head(name) for key in first_keys(tree))

    def read(self, tree: FileTree, options: ReadOptions, stack: ExitStack) -> CanonicalState:
        """Open a checkpoint of any generation, version and division."""
        del stack
        checkpoint = open_shards(tree, locate(tree), options.checkpoint_version)
        keys = list(flat_tensors(checkpoint.first.label, checkpoint.first.chunks()[0]))
        if checkpoint.version is None and all(key.startswith("model.") for key in keys):
            raise UserError(
                f"{tree.label} holds the weights of a NeMo model without its {NEMO_SETTINGS}, which says the order of "
                "query, key and value rows: put that file beside it, or give --source-checkpoint-version (3.0, or "
                "0 for a model with megatron_legacy: true)"
            )
        return read_state(checkpoint, canonical_name, options, format_name=self.name, variant=_generation(keys))

    def write(self, state: CanonicalState, target: Path, options: WriteOptions, progress: Progress) -> None:
        """Write a release directory, divided as asked."""
        version = 3.0 if options.checkpoint_version is None else options.checkpoint_version
        check_version(version, "--checkpoint-version")
        write_megatron(state, target, options, _Names(version, task_head(state)), version, progress)


def _generation(keys: Iterable[str]) -> str:
    text = " ".join(keys)
    if "input_norm" in text:
        return "names since 2023 (encoder, self_attention, input_norm)"
    if "self_attention" in text:
        return "names of 2021 to 2023 (encoder, self_attention, layernorm)"
    return "names of 2019 to 2021 (transformer, attention, layernorm)"
