# SPDX-License-Identifier: Apache-2.0
"""Types of arguments that several commands have."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path


def given_path(text: str) -> Path:
    """A path; an empty one, as of a variable of the shell that is not set, would be the current directory.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise ArgumentTypeError("the path is empty: give one, or . for the current directory")
    return Path(text)
