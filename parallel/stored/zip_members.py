# SPDX-License-Identifier: Apache-2.0
"""Zip files whose members are read in place."""

from __future__ import annotations

import struct
import zipfile

from parallel.errors import DamagedFileError
from parallel.stored.file_range import FileRange

_LOCAL_HEADER = struct.Struct("<26xHH")


def open_zip(place: FileRange) -> zipfile.ZipFile:
    """A zip file over a range.

    Raises:
        UserError: it is truncated or damaged.
    """
    try:
        archive = zipfile.ZipFile(place.open())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, EOFError) as error:
        raise DamagedFileError(f"{place.label} is a truncated or damaged zip file ({error})") from None
    # An archive that lost its end can hold another one as a member, whose end would be taken for its own.
    if min((member.header_offset for member in archive.infolist()), default=0) != 0:
        archive.close()
        raise DamagedFileError(f"{place.label} is a truncated or damaged zip file (its end is missing)")
    return archive


def stored_range(place: FileRange, member: zipfile.ZipInfo, label: str) -> FileRange:
    """Where the bytes of a member that is not compressed lie.

    Raises:
        UserError: the member is compressed, encrypted or cut off.
    """
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
        raise DamagedFileError(f"{label} is compressed or encrypted inside its file, which torch never does")
    header = place.read(member.header_offset, _LOCAL_HEADER.size)
    if header[:4] != b"PK\x03\x04":
        raise DamagedFileError(f"{label} is damaged: its header is missing")
    name, extra = _LOCAL_HEADER.unpack(header)
    return place.part(member.header_offset + _LOCAL_HEADER.size + name + extra, member.file_size, label)
