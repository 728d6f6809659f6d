# SPDX-License-Identifier: Apache-2.0
"""Tar files whose members are read in place.

Python's own reader follows whatever a header says, links, sparse maps and sizes in memory included. Checkpoints in tar
files (NeMo's) need the plain part of the format only: headers of 512 bytes, each before its member.
"""

from __future__ import annotations

from collections.abc import Iterator

from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange

_BLOCK = 512
_MOST_MEMBERS = 100_000
#: Longest extended header (a long name, a size above 8 GiB).
_LONGEST_EXTENSION = 1 << 20
_FILES, _FOLDER, _LONG_NAME, _EXTENDED, _GLOBAL = (b"0", b"\0", b"7"), b"5", b"L", b"x", b"g"


def tar_members(place: FileRange) -> Iterator[tuple[str, FileRange]]:
    """Name and bytes of every regular file of a tar archive, in order.

    Raises:
        UserError: the archive is truncated or damaged, or holds a link or another thing that no checkpoint needs.
    """
    damaged = f"{place.label} is a truncated or damaged tar file"
    at = count = 0
    extended: dict[str, str] = {}
    while at + _BLOCK <= place.length:
        header = bytes(place.read(at, _BLOCK))
        if not header.strip(b"\0"):
            return
        if header[257:262] != b"ustar" or _number(header[148:156]) != _checksum(header):
            raise UserError(f"{damaged}: fetch it again")
        count += 1
        if count > _MOST_MEMBERS:
            raise UserError(f"{place.label} holds more than {_MOST_MEMBERS} members: no checkpoint does")
        large = extended.get("size", "")  # above 8 GiB, which the header has no room for
        size = int(large) if large.isdecimal() and len(large) < 20 else _number(header[124:136])
        if size is None or at + _BLOCK + size > place.length:
            raise UserError(f"{damaged}: a member ends behind its end; fetch it again")
        body = place.part(at + _BLOCK, size)
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
        kind = header[156:157]
        if kind in (_LONG_NAME, _EXTENDED, _GLOBAL):
            if size > _LONGEST_EXTENSION:
                raise UserError(f"{damaged}: a header of {size:,} bytes; fetch it again")
            content = bytes(body.read(0, size))
            if kind == _LONG_NAME:
                extended["path"] = _text(content)
            elif kind == _EXTENDED:
                extended |= _records(content)
            continue
        name = extended.get("path") or "/".join(filter(None, (_text(header[345:500]), _text(header[:100]))))
        extended = {}
        if kind in _FILES:
            yield name, place.part(body.start - place.start, size, f"{place.label}/{brief(name, 200)}")
        elif kind != _FOLDER:
            raise UserError(
                f"{place.label} holds {brief(name, 200)!r}, a link or a special file, which no checkpoint needs: do "
                "not trust it"
            )
    raise UserError(f"{damaged}: its end is missing; fetch it again")


def _number(field: bytes) -> int | None:
    """A number in octal digits, or big-endian binary behind a set top bit; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if all(digit in b"01234567" for digit in digits) else None


def _checksum(header: bytes) -> int:
    return sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _records(content: bytes) -> dict[str, str]:
    """The records ``<length> <key>=<value>`` of an extended header, each ending in a line break."""
    found = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or len(length) > 7 or not len(length) + 1 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[int(length) :]
    return found
