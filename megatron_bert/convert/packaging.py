# SPDX-License-Identifier: Apache-2.0
"""Ways to lay a checkpoint out in files that are known but not read, and what to do about each."""

from __future__ import annotations

import re

from megatron_bert.convert.files import FileTree
from parallel.errors import UserError

_CORE = (
    "a megatron-core checkpoint of the {} kind: convert it to the torch kind first, with Megatron-LM's "
    "--ckpt-convert-format torch --ckpt-convert-save DIRECTORY"
)
#: Names of files that give a packaging away together, and what to tell the user.
_KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"common\.pt", r"\.metadata"), _CORE.format("torch_dist")),
    ((r"common\.pt", r"\.zarray"), _CORE.format("zarr")),
    (
        (r"layer_\d+-model_\d+-model_states\.pt",),
        "a checkpoint of DeepSpeed's pipeline engine, with a file for each layer: merge it first, with "
        "tools/convert_checkpoint/deepspeed_to_megatron.py of Megatron-DeepSpeed",
    ),
    (
        (r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt",),
        "a checkpoint of DeepSpeed's ZeRO stage 3, whose weights lie in pieces: merge them first, with the "
        "zero_to_fp32.py in its folder, and give the file that this writes",
    ),
    (("pickle", "storages", "tensors"), "a file of torch before 0.1.10: load and save it with torch 0.4 first"),
)


def refuse_packaging(tree: FileTree) -> None:
    """Refuse a tree in a packaging that is known but not read.

    Raises:
        UserError: with its name and what to do.
    """
    names = {name.rpartition("/")[2] for name in tree}
    for patterns, text in _KNOWN:
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            raise UserError(f"{tree.label} is {text}")
