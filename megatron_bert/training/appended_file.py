# SPDX-License-Identifier: Apache-2.0
"""A file that grows as a run goes on: what the disk refuses is known at once, and what was removed is noticed."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """A file that is added to, unbuffered; made if it is not there.

    Args:
        path: of the file, whose directory is made too.

    Raises:
        OSError: the file system refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def add(self, content: bytes) -> None:
        """Write all of some bytes, or nothing of them.

        Raises:
            OSError: the file system refuses.
        """
        size = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(size)
            raise

    @property
    def in_place(self) -> bool:
        """Whether it is what has its name still."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        """Close the file."""
        self._file.close()
