# SPDX-License-Identifier: Apache-2.0
"""Files of a model that transformers has just read, or could not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface import WEIGHTS, open_weights
from megatron_bert.convert.state import StateTensor

#: Arguments of from_pretrained that say where files are.
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def file_beside(source: Any, name: str, arguments: dict[str, Any]) -> Path | None:
    """A file of a model that from_pretrained has just read, in a directory or on the hub; None where it has none.

    Args:
        source: the directory or name.
        name: of the file.
        arguments: of from_pretrained, which may say where its files are.
    """
    if source is None:
        return None
    where = {key: arguments[key] for key in _WHERE if key in arguments}
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def stored_tensors(source: Any, arguments: dict[str, Any]) -> dict[str, StateTensor]:
    """The tensors of a model's weights by name, unread; none where its files are not found.

    Args:
        source, arguments: as of :func:`file_beside`.

    Raises:
        UserError: a file of them is damaged, missing, or holds something else.
    """
    config = file_beside(source, "config.json", arguments)
    if config is None:
        return {}
    files = {path.name: path for path in config.parent.iterdir() if path.is_file()}
    if (variant := arguments.get("variant")) is not None:
        files |= {name.replace(f".{variant}", "", 1): path for name, path in files.items()}
    tree = FileTree(str(config.parent), dict(files), config.parent)
    return open_weights(tree)[0] if any(name in tree for name in WEIGHTS) else {}


def remove_stale_index(directory: Path) -> None:
    """Remove the index of an older model in shards, which readers would look into before the one file of this one."""
    index_file, whole = directory / SAFE_WEIGHTS_INDEX_NAME, directory / SAFE_WEIGHTS_NAME
    if index_file.is_file() and whole.is_file() and not any(directory.glob("model-*-of-*.safetensors")):
        index_file.unlink()
