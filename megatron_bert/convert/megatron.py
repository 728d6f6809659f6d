# SPDX-License-Identifier: Apache-2.0
"""The two formats of Megatron-LM: its classic model code's (2019 to 2026), and megatron-core's ``--ckpt-format torch``.

Their files are alike; names differ, and the classic order of query, key and value rows is that of the checkpoint
version, where megatron-core has one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_bert.convert import megatron_names as names
from megatron_bert.convert.divisions import check_version
from megatron_bert.convert.files import FileTree
from megatron_bert.convert.megatron_shards import first_keys, open_shards
from megatron_bert.convert.megatron_state import read_state
from megatron_bert.convert.megatron_writer import MEGATRON_ENTRIES, write_megatron
from megatron_bert.convert.nemo import NEMO_SETTINGS
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.state import CanonicalState
from megatron_bert.model.task_heads.table import of_head
from parallel.errors import UserError


class MegatronLegacy:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "megatron"
    entries = MEGATRON_ENTRIES

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds shards with the names of Megatron's classic model code."""
        places = (names.LEGACY.ours(key) for key in first_keys(tree))
        return any(place is not None and not of_head(place.owner) for place in places)

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open a checkpoint of any generation, version and division."""
        checkpoint = open_shards(tree, options.checkpoint_version)
        keys = checkpoint.first.chunks[0].keys()
        if checkpoint.version is None and all(key.startswith("model.") for key in keys):
            raise UserError(
                f"{tree.label} holds the weights of a NeMo model without its {NEMO_SETTINGS}, which says the order of "
                "query, key and value rows: put that file beside it, or give --source-checkpoint-version (3.0, or "
                "0 for a model with megatron_legacy: true)"
            )
        variant = "names of 2019 to 2021 (transformer, attention, layernorm)"
        if any("input_norm" in key for key in keys):
            variant = "names since 2023 (encoder, self_attention, input_norm)"
        elif any("self_attention" in key for key in keys):
            variant = "names of 2021 to 2023 (encoder, self_attention, layernorm)"
        return read_state(checkpoint, names.LEGACY, options, format_name=self.name, variant=variant)

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write a release directory, divided as asked."""
        version = 3.0 if options.checkpoint_version is None else options.checkpoint_version
        check_version(version, "--checkpoint-version")
        write_megatron(state, target, options, partial(names.legacy_path, modern=version == 3.0), version)


class MegatronCore:
    """Reads and writes the format; see the table of formats for what the methods promise."""

    name = "megatron-core"
    entries = MEGATRON_ENTRIES

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds shards with megatron-core's names."""
        return any("linear_qkv" in key or "linear_fc1" in key for key in first_keys(tree))

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open a checkpoint with norms of either kind."""
        checkpoint = open_shards(tree, options.checkpoint_version)
        fused = any("layer_norm_weight" in key for key in checkpoint.first.chunks[0])
        variant = "norms fused into linear layers (Transformer Engine)" if fused else "norms of their own (local)"
        return read_state(checkpoint, names.CORE, options, format_name=self.name, variant=variant)

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write a release directory, divided as asked."""
        if options.checkpoint_version not in (None, 3.0):
            raise UserError(
                f"--checkpoint-version {options.checkpoint_version} cannot be written for megatron-core, which has one "
                "order of rows only (3.0): leave it out, or convert --to megatron"
            )
        write_megatron(state, target, options, partial(names.core_path, fused=options.norms == "fused"), 3.0)
