# SPDX-License-Identifier: Apache-2.0
"""What a file really is that should have held weights or settings: downloads go wrong in a few well-known ways."""

from __future__ import annotations

import re

from parallel.errors import DamagedFileError
from parallel.stored.file_range import FileRange

_LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/(?:.*?size (\d{1,15}))?", re.DOTALL)
_WEB_PAGE = rb"(?is)\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body)"
_LONGEST_START = 1024
_DOWNLOAD, _UNPACK = "download the file itself", "unpack it first"
_OF_PYTORCH = "give a checkpoint of PyTorch"
#: How a file begins, what it is then, and what to do.
_KNOWN = (
    (_WEB_PAGE, "a web page, such as a login or an error page", _DOWNLOAD),
    (rb"\s*<\?xml", "an XML text, such as the error of a file store", _DOWNLOAD),
    (rb"(?s).{257}ustar", "a tar file", _UNPACK),
    (rb"\x1f\x8b", "a gzip file", _UNPACK),
    (rb"BZh", "a bzip2 file", _UNPACK),
    (rb"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!", "a rar archive", _UNPACK),
    (rb"PK\x03\x04", "a zip file", _UNPACK),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as TensorFlow and Keras write", _OF_PYTORCH),
    (rb"\x93NUMPY", "an array of numpy", _OF_PYTORCH),
)


def is_tar(place: FileRange) -> bool:
    """Whether a file begins as tar archives do."""
    return place.content(262)[257:] == b"ustar"


def refuse_strange(place: FileRange) -> None:
    """Refuse a file that is known to hold neither weights nor settings.

    Raises:
        DamagedFileError: with what it is and what to do; nothing is raised for a file that is not known.
    """
    start = place.content(_LONGEST_START)
    if not start.strip(b"\0 \t\r\n"):
        amount = "empty" if place.length == 0 else "full of zeros or blanks"
        raise DamagedFileError(f"{place.label} is {amount}")
    if pointer := _LFS_POINTER.match(start):
        of = f" to {int(pointer[1]):,} bytes" if pointer[1] else ""
        raise DamagedFileError(
            f"{place.label} is a pointer of git-lfs{of}, not the file itself", "run `git lfs pull` where it is"
        )
    for begin, what, remedy in _KNOWN:
        if re.match(begin, start):
            raise DamagedFileError(f"{place.label} is {what}", remedy)
