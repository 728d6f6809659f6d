# SPDX-License-Identifier: Apache-2.0
"""Types of arguments that several commands have."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path

from parallel.errors import UserError

#: Endings of the files that options write, for those that have one; names without any are taken, too.
_ENDINGS = {"--png": ".png"}


def given_path(text: str) -> Path:
    """A path; an empty one, as of a variable of the shell that is not set, would be the current directory.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise ArgumentTypeError("the path is empty: give one, or . for the current directory")
    return Path(text)


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Refuse paths to which no files can be written, before the work that is to be written there.

    Args:
        outputs: by the names of their options; None where there is nothing to write.
        inputs: files that are read, by what they are called, which none of them may replace.

    Raises:
        UserError: one is a folder, a device or a pipe, in a folder that does not exist, the same file as another, or
            has the ending of another format.
    """
    others = {name: path for name, path in (inputs or {}).items() if path is not None and path.exists()}
    for name, path in outputs.items():
        if path is None:
            continue
        if (path.exists() and not path.is_file()) or not path.parent.is_dir():
            raise UserError(f"{name} {path} cannot be written: name a file in a folder that exists")
        for other, there in others.items():
            if path.resolve() == there.resolve():
                raise UserError(f"{name} {path} is the file of {other}, too: give {name} another one")
        others[name] = path
        ending = _ENDINGS.get(name)
        if ending is not None and path.suffix and path.suffix.lower() != ending:
            raise UserError(f"{name} {path} has the ending of another format: give it a name that ends in {ending}")
