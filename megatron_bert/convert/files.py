# SPDX-License-Identifier: Apache-2.0
"""Where checkpoint bytes lie: trees of named ranges (a folder, one file, or an archive).

Readers ask a tree for a name and get a :class:`FileRange`, so they do not know whether a checkpoint lies in a folder or
inside a zip file. Nothing is read until a range is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parallel.errors import UserError
from parallel.stored.file_range import FileRange
from parallel.stored.torch_files import load_torch_file

#: Folders below a checkpoint folder that are searched for its files: iter_0001000/mp_rank_00/ is two.
_DEPTH = 3
#: More entries than this are not a checkpoint, but a folder named by mistake (a home directory).
_MOST_ENTRIES = 100_000
#: What desktops leave beside files: macOS's forks (``._x``), settings of folders, thumbnails.
_DEBRIS = re.compile(r"(?:^|/)(?:\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX/.*)\Z", re.DOTALL)


class FileTree(Mapping[str, FileRange]):
    """Names (relative, with forward slashes) and the bytes they stand for; the debris of desktops is left out.

    Attributes:
        label: what to call the tree in messages.
        folder: the folder it was made from, or None when it is not a folder on disk.
    """

    def __init__(self, label: str, files: dict[str, Path | FileRange], folder: Path | None = None) -> None:
        self.label, self.folder = label, folder
        self._files = {name: place for name, place in files.items() if not _DEBRIS.search(name)}
        self._structures: dict[str, Any] = {}

    def __getitem__(self, name: str) -> FileRange:
        place = self._files[name]
        return place if isinstance(place, FileRange) else FileRange.whole(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def structure(self, name: str) -> Any:
        """What a file of ``torch.save`` holds, tensors unread; however often it is asked for, it is read once.

        Raises:
            UserError: it is none, or damaged.
        """
        if name not in self._structures:
            self._structures[name] = load_torch_file(self[name])
        return self._structures[name]


def folder_tree(folder: Path) -> FileTree:
    """The files of a folder and of the folders in it.

    Raises:
        UserError: it cannot be listed, or holds far too much.
    """
    files: dict[str, Path | FileRange] = {}

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): check its permissions")

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        where = Path(root).relative_to(folder)
        if len(where.parts) >= _DEPTH:
            folders.clear()
        for name in sorted(names):
            files[(where / name).as_posix()] = Path(root, name)
        if len(files) > _MOST_ENTRIES:
            raise UserError(f"{folder} holds more than {_MOST_ENTRIES} files: name the folder of one checkpoint")
    return FileTree(str(folder), files, folder)
