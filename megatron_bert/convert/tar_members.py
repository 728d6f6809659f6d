# SPDX-License-Identifier: Apache-2.0
"""Tar files whose members are read in place.

Python's reader finds them, but would follow a header's word into memory, and takes a damaged header for the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange

_MOST_MEMBERS = 100_000
#: Longest extended header (a long name, a size above 8 GiB).
_LONGEST_EXTENSION = 1 << 20


class _Headers:
    """The headers of an archive as a file: all that is read of it, as members are passed over."""

    def __init__(self, place: FileRange) -> None:
        self._place, self._at = place, 0

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> None:
        self._at = at

    def read(self, size: int) -> bytes:
        if size > _LONGEST_EXTENSION:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        found = bytes(self._place.read(self._at, max(0, min(size, self._place.length - self._at))))
        self._at += len(found)
        return found


def tar_members(place: FileRange) -> Iterator[tuple[str, FileRange]]:
    """Name and bytes of every regular file of a tar archive, in order.

    Raises:
        UserError: the archive is truncated or damaged, or holds a link or another thing that no checkpoint needs.
    """
    damaged = f"{place.label} is a truncated or damaged tar file"
    file = _Headers(place)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
            for count, member in enumerate(archive, 1):
                if count > _MOST_MEMBERS:
                    raise UserError(f"{place.label} holds more than {_MOST_MEMBERS} members: no checkpoint does")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{place.label} holds {brief(member.name, 200)!r}, a link or a special file, which no "
                        "checkpoint needs: do not trust it"
                    )
                if member.size < 0 or member.offset_data + member.size > place.length:
                    raise tarfile.ReadError("a member ends behind its end")
                label = f"{place.label}/{brief(member.name, 200)}"
                yield member.name, place.part(member.offset_data, member.size, label)
            file.seek(archive.offset)
            if len(end := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{damaged} ({brief(error)}): fetch it again") from None
