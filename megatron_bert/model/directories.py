# SPDX-License-Identifier: Apache-2.0
"""Directories that models and their configurations are read from and written into, as users name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.errors import UserError, its_class


def directory_path(directory: Any) -> Path:
    """The path of a directory, which need not be there.

    Raises:
        UserError: what is given is not a path.
    """
    try:
        return Path(directory)
    except TypeError:
        raise UserError(f"the directory is {its_class(directory)}: give its path") from None


def made_directory(directory: Any) -> Path:
    """The path of a directory, made with those above it where it is not there.

    Raises:
        UserError: it cannot be made.
    """
    path = directory_path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a null character is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{directory} cannot be made a directory ({reason}): give the path of another") from None
    return path
