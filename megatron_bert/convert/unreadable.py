# SPDX-License-Identifier: Apache-2.0
"""Why a source is not a checkpoint that can be read, as far as its files show it."""

from __future__ import annotations

import re

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface import WEIGHTS
from megatron_bert.convert.megatron_shards import MODEL_KEYS, weight_files
from megatron_bert.model.configuration import CONFIG_NAME
from parallel.errors import UserError, brief
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.strange_files import refuse_strange

_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "base_optimizer_state", "shard_fp32_from_float16_groups")
_HUGGING_FACE_KEY = re.compile(r"(?:bert\.)?encoder\.layer\.\d+\..*|cls\.predictions\..*")
_WEIGHTS = (".safetensors", ".bin")


def explained(tree: FileTree, formats: str) -> UserError:
    """The error for a tree that no format takes; ``formats`` are those that there are, for a message.

    Raises:
        UserError: a file of the tree is damaged or something else than it should be; with what it is.
    """
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
        f"{tree.label} is not a checkpoint of a kind that is known ({formats}); it holds {brief(held, 200)}: give a "
        "checkpoint file, its folder, or an archive with one"
    )


def _about_file(tree: FileTree, name: str) -> UserError:
    place = tree[name]
    if name.endswith(".safetensors"):
        refuse_strange(place)
        return UserError(f"{place.label} has no config.json beside it, which says what model it is: put it there")
    content = tree.structure(name)
    if not isinstance(content, dict):
        return UserError(f"{place.label} holds a {type(content).__name__} instead of a dictionary: give a checkpoint")
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
