# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's BertModel, as saved with ``--ckpt-format torch``.

Keys are flat. The layer norms are modules of their own (local layer specification) or parameters of the linear layers
behind them (Transformer Engine). Query, key and value rows are always ``[heads, 3, head_dim]``.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.megatron_shards import first_keys, flat_tensors, locate, open_shards
from megatron_bert.convert.megatron_state import TASK_HEAD, TIED, read_state
from megatron_bert.convert.megatron_writer import MEGATRON_ENTRIES, MegatronNames, task_head, write_megatron
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.progress import Progress
from megatron_bert.convert.state import CanonicalState
from parallel.errors import UserError

_NAMES = {
    "embedding.word_embeddings": "embeddings.word_embeddings",
    "embedding.position_embeddings": "embeddings.position_embeddings",
    "embedding.tokentype_embeddings": "embeddings.token_type_embeddings",
    "encoder.final_layernorm": "encoder.final_norm",
    "lm_head.dense": "masked_head.dense",
    "lm_head.layer_norm": "masked_head.norm",
    "pooler.dense": "pair_head.pooler",
    "binary_head": "pair_head.classifier",
}
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.output",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.intermediate",
    "mlp.linear_fc2": "mlp.output",
}
#: Where Transformer Engine keeps the norm before a linear layer.
_FUSED = {"attention_norm": "self_attention.linear_qkv", "mlp_norm": "mlp.linear_fc1"}
_THEIR_NAMES = {ours: theirs for theirs, ours in (_NAMES | _LAYER_NAMES).items()}
_LAYER = re.compile(r"encoder\.layers\.(\d{1,6})\.(.+)\.(layer_norm_)?(weight|bias)")


def canonical_name(key: str) -> str | None:
    """The canonical name of a key."""
    key = re.sub(r"^(?:(?:model|module)\.)+", "", key)
    if key == "output_layer.weight":
        return TIED
    if key == "output_layer.bias":
        return "masked_head.bias"
    if (head := TASK_HEAD.fullmatch(key)) is not None:
        return f"classifier.{head[1]}"
    if (layer := _LAYER.fullmatch(key)) is not None:
        _, part, fused, kind = layer.groups()
        ours = next((n for n, t in _FUSED.items() if t == part), None) if fused else _LAYER_NAMES.get(part)
        return None if ours is None else f"encoder.layers.{layer[1]}.{ours}.{kind}"
    owner, _, kind = key.rpartition(".")
    return f"{_NAMES[owner]}.{kind}" if owner in _NAMES and kind in ("weight", "bias") else None


class _Names(MegatronNames):
    def __init__(self, *, fused: bool, task_head: str) -> None:
        self._fused, self._task_head = fused, task_head

    def path(self, name: str) -> tuple[str, ...]:
        if name == "masked_head.bias":
            return ("output_layer.bias",)
        owner, _, kind = name.rpartition(".")
        if owner == "classifier":
            return (f"{self._task_head}.{kind}",)
        if not owner.startswith("encoder.layers."):
            return (f"{_THEIR_NAMES[owner]}.{kind}",)
        _, _, number, part = owner.split(".", 3)
        if self._fused and part in _FUSED:
            return (f"encoder.layers.{number}.{_FUSED[part]}.layer_norm_{kind}",)
        return (f"encoder.layers.{number}.{_THEIR_NAMES[part]}.{kind}",)

    def tied_path(self) -> tuple[str, ...]:
        return ("output_layer.weight",)


class MegatronCore:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "megatron-core"
    entries = MEGATRON_ENTRIES

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds shards with megatron-core's names."""
        return any("linear_qkv" in key or "linear_fc1" in key for key in first_keys(tree))

    def read(self, tree: FileTree, options: ReadOptions, stack: ExitStack) -> CanonicalState:
        """Open a checkpoint with norms of either kind."""
        del stack
        checkpoint = open_shards(tree, locate(tree), options.checkpoint_version)
        keys = flat_tensors(checkpoint.first.label, checkpoint.first.chunks()[0])
        fused = any("layer_norm_weight" in key for key in keys)
        variant = "norms fused into linear layers (Transformer Engine)" if fused else "norms of their own (local)"
        return read_state(checkpoint, canonical_name, options, format_name=self.name, variant=variant)

    def write(self, state: CanonicalState, target: Path, options: WriteOptions, progress: Progress) -> None:
        """Write a release directory, divided as asked."""
        if options.checkpoint_version not in (None, 3.0):
            raise UserError(
                f"--checkpoint-version {options.checkpoint_version} cannot be written for megatron-core, which has one "
                "order of rows only (3.0): leave it out, or convert --to megatron"
            )
        names = _Names(fused=options.norms == "fused", task_head=task_head(state))
        write_megatron(state, target, options, names, 3.0, progress)
