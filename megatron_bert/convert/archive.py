"""Zip archives as file trees: members that may be read in place are, others go through a file on disk; never memory.

An archive is somebody else's file, so nothing in it decides where bytes are written: members unpack into files of our
own naming, and one that would reach outside, or that unpacks to far more than it weighs, refuses the whole archive.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from megatron_bert.convert.files import FileTree
from parallel.errors import UserError
from parallel.stored.file_range import FileRange
from parallel.stored.zip_members import open_zip, stored_range

#: Weights shrink by a tenth or so; a member that unpacks to this many times its weight is an attack or all zeros.
_MOST_EXPANSION = 200
#: Small members (a text file of one word) may expand as they like.
_ALWAYS_ALLOWED = 64 << 20


def archive_tree(path: Path, stack: ExitStack) -> FileTree:
    """The members of a zip archive as a tree.

    Args:
        path: of the archive.
        stack: closes what is unpacked; the tree is of no use after it.

    Raises:
        UserError: the archive is damaged, or a member is a link, encrypted, expands beyond reason, or has a name that
            reaches outside.
    """
    whole = FileRange.whole(path)
    files: dict[str, Path | FileRange] = {}
    with open_zip(whole) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            _check_member(path, member)
        if len({member.filename for member in members}) < len(members):
            raise UserError(f"{path} holds two members of one name: it is damaged or made to mislead")
        _check_expansion(path, whole.length, members)
        unpacked: Path | None = None
        for number, member in enumerate(members):
            label = f"{path}/{member.filename}"
            if member.compress_type == zipfile.ZIP_STORED:
                files[member.filename] = stored_range(whole, member, label)
                continue
            if unpacked is None:
                unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-bert-")))
                _check_room(path, unpacked, sum(m.file_size for m in members))
            target = unpacked / str(number)
            _unpack(archive, member, target, label)
            files[member.filename] = FileRange.whole(target, label)
    return FileTree(str(path), files)


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if not member.filename.isprintable():
        raise UserError(f"{path} holds {member.filename!r}, a name that cannot be printed: do not trust it")
    if name.is_absolute() or ".." in name.parts or ":" in member.filename or "\0" in member.orig_filename:
        raise UserError(f"{path} holds {member.filename!r}, a path that reaches outside the archive: do not trust it")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(
            f"{path} holds {member.filename!r}, a symbolic link, which no checkpoint needs: do not trust it"
        )
    if member.flag_bits & 1:
        raise UserError(f"{path} holds {member.filename!r} encrypted: decrypt the archive first")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path} holds {member.filename!r} in an unusual compression: pack it again with plain zip")


def _check_expansion(path: Path, weight: int, members: list[zipfile.ZipInfo]) -> None:
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(_ALWAYS_ALLOWED, _MOST_EXPANSION * weight):
        raise UserError(
            f"{path} weighs {weight:,} bytes and would unpack to {unpacked:,}: no checkpoint does that, do not trust it"
        )


def _check_room(path: Path, folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{path} unpacks to {size:,} bytes but {folder.parent} has {free:,} free: set TMPDIR to a larger place"
        )


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, label: str) -> None:
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            # Reads no more than the size that the member declares, and checks its checksum at the end.
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{label} cannot be unpacked ({error}): fetch the archive again") from None
    if target.stat().st_size != member.file_size:
        raise UserError(f"{label} unpacks to less than its size: fetch the archive again")
