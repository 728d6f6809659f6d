# SPDX-License-Identifier: Apache-2.0
"""Types of arguments that several commands have."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from parallel.errors import UserError


def given_path(text: str) -> Path:
    """A path; an empty one, as of a variable of the shell that is not set, would be the current directory.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise ArgumentTypeError("the path is empty: give one, or . for the current directory")
    return Path(text)


def check_output(name: str, path: Path | None) -> None:
    """Refuse a path to which no file can be written, before the work that is to be written there.

    Args:
        path: given; None where there is nothing to write.

    Raises:
        UserError: it is a folder, a device or a pipe, or in a folder that does not exist.
    """
    if path is not None and ((path.exists() and not path.is_file()) or not path.parent.is_dir()):
        raise UserError(f"{name} {path} cannot be written: name a file in a folder that exists")
