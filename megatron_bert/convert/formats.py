# SPDX-License-Identifier: Apache-2.0
"""The formats. Adding one is a file with a class of this protocol, and a line in the table."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface import HuggingFace
from megatron_bert.convert.megatron import MegatronCore, MegatronLegacy
from megatron_bert.convert.native import Native
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.state import CanonicalState
from megatron_bert.convert.unreadable import explained


class Format(Protocol):
    """One kind of checkpoint."""

    @property
    def name(self) -> str:
        """How users call it, with ``--to``."""

    @property
    def entries(self) -> str:
        """Pattern of the names that a folder with such a checkpoint holds at its top, as ``write`` makes them."""

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds a checkpoint of this kind; may raise UserError when it does and is broken."""

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open it without reading tensors."""

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write a state into an empty folder, one tensor in memory at a time."""


#: In the order in which a source is asked what it is.
FORMATS: dict[str, Format] = {
    format_.name: format_ for format_ in (Native(), HuggingFace(), MegatronCore(), MegatronLegacy())
}


def detect_format(tree: FileTree) -> Format:
    """The format of a tree.

    Raises:
        UserError: it is none of the table's.
    """
    for candidate in FORMATS.values():
        if candidate.detect(tree):
            return candidate
    raise explained(tree, ", ".join(FORMATS))
