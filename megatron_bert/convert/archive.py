# SPDX-License-Identifier: Apache-2.0
"""Zip and tar archives as file trees: members that may be read in place are, others go through a file; never memory.

An archive is somebody else's file, so nothing in it decides where bytes are written: members unpack into files of our
own naming, and one that would reach outside, or that unpacks to far more than it weighs, refuses the whole archive.
"""

from __future__ import annotations

import errno
import gzip
import io
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from megatron_bert.convert.files import FileTree
from megatron_bert.model.configuration import CONFIG_NAME
from parallel.checkpoint import STATE_FILE
from parallel.errors import UserError, brief
from parallel.stored.file_range import FileRange
from parallel.stored.strange_files import is_tar
from parallel.stored.torch_files import is_torch_file
from parallel.stored.zip_members import open_zip, stored_range
from parallel.whole_files import reason_of, reporting

#: Weights shrink by a tenth or so; a member that unpacks to this many times its weight is an attack or all zeros.
_MOST_EXPANSION = 200
#: Small members (a text file of one word) may expand as they like.
_ALWAYS_ALLOWED = 64 << 20
#: Archives inside archives that are opened.
_DEEPEST = 2
#: Endings of files that are a part of a checkpoint themselves.
_TORCH_SHARDS = ".distcp"  # of torch.distributed.checkpoint: a file of torch.save per tensor, one behind the other
_PARTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", _TORCH_SHARDS)
_MOST_MEMBERS = 100_000
#: Longest extended header (a long name, a size above 8 GiB).
_LONGEST_EXTENSION = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def is_archive(place: FileRange) -> bool:
    """Whether a file is an archive of others; those of torch, which are zip files too or begin with one, are not."""
    if place.label.endswith(_TORCH_SHARDS):
        return False
    start = place.content(4)
    if start.startswith(b"PK\x03\x04"):
        return not is_torch_file(place)
    return start.startswith(_GZIP_MAGIC) or is_tar(place)


def archive_tree(path: Path, stack: ExitStack) -> FileTree:
    """The members of an archive as a tree; of the archive or the model's folder in it, where there is nothing else.

    Args:
        path: of a zip file, or of a tar file, plain (as NeMo's) or compressed with gzip.
        stack: closes what is unpacked; the tree is of no use after it.

    Raises:
        UserError: the archive is damaged, or a member is a link, encrypted, expands beyond reason, or has a name that
            reaches outside.
    """
    place = FileRange.whole(path)
    scratch = _Scratch(place, stack)
    tree = _tree(place, scratch)
    for _ in range(_DEEPEST):
        archives = [name for name in tree if is_archive(tree[name])]
        if len(archives) != 1 or any(name.endswith(_PARTS) for name in tree if name not in archives):
            break
        tree = _tree(tree[archives[0]], scratch)
    return _inner_folder(tree)


def _inner_folder(tree: FileTree) -> FileTree:
    """The only folder of an archive, where a model or a run's checkpoint lies in that; the whole archive else."""
    folders = {name.partition("/")[0] for name in tree}
    folder = next(iter(folders), "")
    if len(folders) != 1 or not any(f"{folder}/{name}" in tree for name in (CONFIG_NAME, STATE_FILE)):
        return tree
    return FileTree(f"{tree.label}/{folder}", {name.partition("/")[2]: tree[name] for name in tree})


class _Scratch:
    """Room for what must be unpacked, and how much that may be, by the weight of the outermost archive.

    What is unpacked lies in files without names, so nothing stays behind where the process is killed.
    """

    def __init__(self, place: FileRange, stack: ExitStack) -> None:
        self._place, self._stack, self._claimed = place, stack, 0

    def claim(self, size: int) -> None:
        """Refuse the archive if it unpacks to so much more that no checkpoint would."""
        self._claimed += size
        if self._claimed > max(_ALWAYS_ALLOWED, _MOST_EXPANSION * self._place.length):
            raise UserError(
                f"{self._place.label} weighs {self._place.length:,} bytes and would unpack to {self._claimed:,}: "
                "no checkpoint does that, do not trust it"
            )

    def unpack(self, chunks: Iterable[bytes], size: int, label: str) -> FileRange:
        """What comes in chunks, in a file; ``size`` is what it is expected to take."""
        with reporting("unpacked", self._place.label, "set TMPDIR to another place"):
            sink = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
            free = shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            raise UserError(
                f"{self._place.label} unpacks to {size:,} bytes but {tempfile.gettempdir()} has {free:,} free: "
                "set TMPDIR to a larger place"
            )
        try:
            for chunk in chunks:
                sink.write(chunk)
            sink.flush()
        except UserError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
            said, remedy = str(error), "fetch the archive again"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                said, remedy = reason_of(error), "set TMPDIR to a larger place"
            raise UserError(f"{label} cannot be unpacked ({said}): {remedy}") from None
        return FileRange(Path(label), 0, sink.tell(), label, sink.fileno())


def _tree(place: FileRange, scratch: _Scratch) -> FileTree:
    """The members of an archive under their names as relative paths, if these stay inside it."""
    if place.content(2) == _GZIP_MAGIC:
        place = _decompressed(place, scratch)
        if not is_tar(place):
            raise UserError(f"{place.label} is one file that gzip compressed: unpack it first")
    files: dict[str, Path | FileRange] = {}
    for name, member in _tar_members(place) if is_tar(place) else _zip_members(place, scratch):
        path = PurePosixPath(name.replace("\\", "/"))
        if not name.isprintable():
            raise UserError(f"{place.label} holds {name!r}, a name that cannot be printed: do not trust it")
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise UserError(f"{place.label} holds {name!r}, a path that reaches outside the archive: do not trust it")
        if str(path) in files:
            raise UserError(f"{place.label} holds two members of one name: it is damaged or made to mislead")
        files[str(path)] = member
    return FileTree(place.label, files)


def _decompressed(place: FileRange, scratch: _Scratch) -> FileRange:
    def chunks() -> Iterator[bytes]:
        with place.open() as file, gzip.open(file) as source:
            while chunk := source.read(1 << 20):
                scratch.claim(len(chunk))
                yield chunk

    return scratch.unpack(chunks(), place.length, place.label)


def _zip_members(place: FileRange, scratch: _Scratch) -> Iterator[tuple[str, FileRange]]:
    """Name and bytes of every file of a zip archive; those of compressed ones in a file of their own."""
    with open_zip(place) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            _check_member(place.label, member)
        scratch.claim(sum(member.file_size for member in members))
        for member in members:
            label = f"{place.label}/{member.filename}"
            if member.compress_type == zipfile.ZIP_STORED:
                held = stored_range(place, member, label)
            else:
                held = scratch.unpack(_chunks(archive, member), member.file_size, label)
                if held.length != member.file_size:
                    raise UserError(f"{label} unpacks to less than its size: fetch the archive again")
            yield member.filename, held


def _chunks(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member, no more than it declares; its checksum is compared at the end."""
    with archive.open(member) as source:
        yield from iter(lambda: source.read(1 << 20), b"")


def _check_member(label: str, member: zipfile.ZipInfo) -> None:
    if "\0" in member.orig_filename:
        fault = ", a path that reaches outside the archive: do not trust it"
    elif stat.S_ISLNK(member.external_attr >> 16):
        fault = ", a symbolic link, which no checkpoint needs: do not trust it"
    elif member.flag_bits & 1:
        fault = " encrypted: decrypt the archive first"
    elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = " in an unusual compression: pack it again with plain zip"
    else:
        return
    raise UserError(f"{label} holds {member.filename!r}{fault}")


# ---------------------------------------------------------------- tar files


class _Headers(io.BufferedReader):
    """The archive, of which only headers are read as members are passed over."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_EXTENSION:
            raise tarfile.ReadError(f"a header of {size or 0:,} bytes")
        return super().read(size)


def _tar_members(place: FileRange) -> Iterator[tuple[str, FileRange]]:
    """Name and bytes of every regular file of a tar archive, in order.

    Raises:
        UserError: the archive is truncated or damaged, or holds a link or another thing that no checkpoint needs.
    """
    try:
        with _Headers(place.open().detach()) as file, tarfile.open(fileobj=file, mode="r:") as archive:
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
        raise UserError(f"{place.label} is a truncated or damaged tar file ({brief(error)}): fetch it again") from None
