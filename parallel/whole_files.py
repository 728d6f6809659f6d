# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are whole or not there, and what the file system refuses, said in one sentence."""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from parallel.errors import UserError


def reason_of(error: OSError) -> str:
    """What the operating system said, such as ``No space left on device``."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def reporting(action: str, path: Path | str, remedy: str) -> Iterator[None]:
    """Report what the file system refuses as a mistake that a user can fix.

    Args:
        action: what cannot be done, such as ``written``.
        remedy: what to do about it.

    Raises:
        UserError: in place of every OSError in the block.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) and error.filename != str(path) else None
        where = f" at {named}" if named is not None else ""
        raise UserError(f"{path} cannot be {action} ({reason_of(error)}{where}): {remedy}") from error


def sync_to_disk(path: Path) -> None:
    """Make the bytes of a file, or the renames and removals in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, mode: str = "w", *, sync: bool = False) -> Iterator[IO[Any]]:
    """A file to write to, which takes its name and place when the block ends without an error.

    Until then, and after an error, whatever was there before is there still. The temporary file lies beside it, under
    a name of its own for each writer.

    Args:
        mode: ``w`` for text in UTF-8, ``wb`` for bytes.
        sync: return only when the bytes and the name are on the disk.

    Raises:
        OSError: the file system refuses; see :func:`reporting`.
    """
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with temporary.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the name that the user knows
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk(path.parent)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file that is whole or not there."""
    with whole_file(path, sync=sync) as file:
        file.write(text)


def write_bytes(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file of bytes that is whole or not there."""
    with whole_file(path, "wb", sync=sync) as file:
        file.write(content)


def write_picture(path: Path, figure: Any, dpi: float) -> None:
    """Write a figure of matplotlib as a PNG file that is whole or not there.

    Drawn in memory: what writes PNG files does not say what the file system refuses.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_bytes(path, content.getvalue())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole or not there."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write to, which takes the name and place of another when the block ends without an error.

    After an error, and when the process is killed on the way, what was there before is there still; after a kill
    between the two renames at the end the next call puts it back.
    """
    partial, old = (directory.with_name(f"{directory.name}.{ending}") for ending in ("partial", "old.partial"))
    if old.exists() and not directory.exists():
        old.rename(directory)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
