# SPDX-License-Identifier: Apache-2.0
"""What a file really is that should have held weights or settings: downloads go wrong in a few well-known ways."""

from __future__ import annotations

import re

from parallel.errors import DamagedFileError
from parallel.stored.file_range import FileRange

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_TAR_MAGIC = (257, b"ustar")
_LONGEST_START = 1024
_MAGICS = (
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"BZh", "a bzip2 file", "unpack it first"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!", "a rar archive", "unpack it first"),
    (b"PK\x03\x04", "a zip file", "unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as TensorFlow and Keras write", "give a checkpoint of PyTorch"),
    (b"\x93NUMPY", "an array of numpy", "give a checkpoint of PyTorch"),
)


def is_tar(place: FileRange) -> bool:
    """Whether a file begins as tar archives do."""
    return bytes(place.read(0, min(place.length, 262)))[_TAR_MAGIC[0] :] == _TAR_MAGIC[1]


def refuse_strange(place: FileRange) -> None:
    """Refuse a file that is known to hold neither weights nor settings.

    Raises:
        DamagedFileError: with what it is and what to do; nothing is raised for a file that is not known.
    """
    start = bytes(place.read(0, min(place.length, _LONGEST_START)))
    if not start.strip(b"\0 \t\r\n"):
        amount = "empty" if place.length == 0 else "full of zeros or blanks"
        raise DamagedFileError(f"{place.label} is {amount}")
    if start.startswith(_LFS_POINTER):
        size = re.search(rb"size (\d{1,15})", start)
        of = f" to {int(size[1]):,} bytes" if size else ""
        raise DamagedFileError(
            f"{place.label} is a pointer of git-lfs{of}, not the file itself", "run `git lfs pull` where it is"
        )
    if re.match(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body)", start, re.IGNORECASE | re.DOTALL):
        raise DamagedFileError(
            f"{place.label} is a web page, such as a login or an error page", "download the file itself"
        )
    if re.match(rb"\s*<\?xml", start):
        raise DamagedFileError(
            f"{place.label} is an XML text, such as the error of a file store", "download the file itself"
        )
    if start[_TAR_MAGIC[0] :].startswith(_TAR_MAGIC[1]):
        raise DamagedFileError(f"{place.label} is a tar file", "unpack it first")
    for magic, what, remedy in _MAGICS:
        if start.startswith(magic):
            raise DamagedFileError(f"{place.label} is {what}", remedy)
