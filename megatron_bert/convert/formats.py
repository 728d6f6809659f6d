# SPDX-License-Identifier: Apache-2.0
"""The formats, and why a source is of none. Adding one is a class of this protocol, and a line in the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface import WEIGHTS, HuggingFace
from megatron_bert.convert.integer_plans import HEADER_BYTES, PLAN_NAME, begins_as_plan
from megatron_bert.convert.megatron import MegatronCore, MegatronLegacy
from megatron_bert.convert.megatron_shards import MODEL_KEYS, weight_files
from megatron_bert.convert.native import Native
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.state import CanonicalState
from megatron_bert.model.configuration import CONFIG_NAME
from parallel.errors import UserError, brief, its_class
from parallel.stored.file_range import FileRange
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.strange_files import refuse_strange


class Format(Protocol):
    """One kind of checkpoint.

    Attributes:
        name: how users call it, with ``--to``.
        entries: pattern of the names that a folder with such a checkpoint holds at its top, as ``write`` makes them.
    """

    name: str
    entries: str

    def detect(self, tree: FileTree) -> bool:
        """Whether the tree holds a checkpoint of this kind; may raise UserError when it does and is broken."""

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open it without reading tensors."""

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write a state into an empty folder, one tensor in memory at a time."""


_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "base_optimizer_state", "shard_fp32_from_float16_groups")
_HUGGING_FACE_KEY = re.compile(r"(?:bert\.)?encoder\.layer\.\d+\..*|cls\.predictions\..*")
_WEIGHTS = (".safetensors", ".bin")

#: In the order in which a source is asked what it is.
FORMATS: dict[str, Format] = {
    format_.name: format_ for format_ in (Native(), HuggingFace(), MegatronCore(), MegatronLegacy())
}


def detect_format(tree: FileTree) -> Format:
    """The format of a tree.

    Raises:
        UserError: it is none of the table's; with what it is, as far as its files show it.
    """
    found = next((candidate for candidate in FORMATS.values() if candidate.detect(tree)), None)
    if found is None:
        raise _explained(tree)
    return found


def _explained(tree: FileTree) -> UserError:
    """The error for a tree that no format takes; raised by itself where a file of the tree is damaged."""
    if any(_is_plan(tree[name], name) for name in tree):
        return UserError(
            f"{tree.label} is an integer plan, which holds no weights: give the quantized model that it was made from"
        )
    if CONFIG_NAME in tree:
        names = ", ".join(WEIGHTS[:-1]) + f" or {WEIGHTS[-1]}"
        return UserError(f"{tree.label} holds {CONFIG_NAME}, but no {names}: copy all files of the model")
    candidates = weight_files(tree) or [name for name in tree if name.endswith(_WEIGHTS)]
    if len(candidates) == 1:
        return _about_file(tree, candidates[0])
    if candidates:
        names = brief(", ".join(sorted(candidates)), 200)
        return UserError(f"{tree.label} holds several files that may be a model ({names}): give one of them")
    held = ", ".join(sorted(tree)[:5]) or "nothing"
    return UserError(
        f"{tree.label} is not a checkpoint of a kind that is known ({', '.join(FORMATS)}); it holds "
        f"{brief(held, 200)}: give a checkpoint file, its folder, or an archive with one"
    )


def _is_plan(place: FileRange, name: str) -> bool:
    header = name.endswith(".safetensors") and begins_as_plan(place.content(HEADER_BYTES))
    return header or name.endswith(PLAN_NAME)


def _about_file(tree: FileTree, name: str) -> UserError:
    place = tree[name]
    if name.endswith(".safetensors"):
        refuse_strange(place)
        return UserError(f"{place.label} has no config.json beside it, which says what model it is: put it there")
    content = tree.structure(name)
    if not isinstance(content, dict):
        return UserError(f"{place.label} holds {its_class(content)} instead of a dictionary: give a checkpoint")
    inner = next((content[key] for key in MODEL_KEYS if isinstance(content.get(key), dict)), content)
    keys = [str(key) for key, value in inner.items() if isinstance(value, StoredTensor)]
    if any(_HUGGING_FACE_KEY.fullmatch(key) for key in keys):
        return UserError(
            f"{place.label} holds a model with Hugging Face's names but no config.json beside it: put it there, and "
            "call the weights pytorch_model.bin"
        )
    if any(key in content for key in _OPTIMIZER_KEYS):
        return UserError(f"{place.label} holds the state of an optimizer: give the file with the model's weights")
    held = ", ".join(keys[:3]) or "no tensors"
    return UserError(f"{place.label} holds {brief(held, 200)}: no model of a kind that is known")
