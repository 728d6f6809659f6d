# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, read without running them and without reading their tensors.

Two containers are in use: since torch 1.6 a zip file with one member a storage, before it a stream of pickles followed
by the bytes of every storage. Checkpoints of 2020 are of the second kind.
"""

from __future__ import annotations

import struct
from typing import Any

import torch

from parallel.errors import DamagedFileError, UserError, brief
from parallel.stored.file_range import FileRange
from parallel.stored.pickles import load_pickle
from parallel.stored.stored_tensor import StorageRecord
from parallel.stored.strange_files import refuse_strange
from parallel.stored.torch_vocabulary import torch_vocabulary
from parallel.stored.vocabulary import Vocabulary
from parallel.stored.zip_members import open_zip, stored_range

_ZIP_MAGIC = b"PK\x03\x04"
#: The pickle of torch's magic number.
_STREAM_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_STREAM_PROTOCOL = 1001
_LONGEST_PICKLE = 1 << 30


def is_torch_file(place: FileRange) -> bool:
    """Whether the bytes begin as torch.save's do; an archive with other things than a checkpoint does not count."""
    start = place.content(len(_STREAM_START))
    if start == _STREAM_START:
        return True
    if not start.startswith(_ZIP_MAGIC):
        return False
    with open_zip(place) as archive:
        return any(name.count("/") == 1 and name.endswith("/data.pkl") for name in archive.namelist())


def load_torch_file(place: FileRange) -> Any:
    """What was saved, with a :class:`StoredTensor` for every tensor.

    Raises:
        UserError: the file is of another kind or damaged, or asks to load something else than data.
    """
    start = place.content(len(_STREAM_START))
    if start.startswith(_ZIP_MAGIC):
        return _load_zip(place)
    if start.startswith(_STREAM_START):
        return _load_stream(place)
    refuse_strange(place)
    raise DamagedFileError(f"{place.label} is not a file of torch.save", "give a checkpoint, or a .zip file with one")


# ---------------------------------------------------------------- zip container


def _load_zip(place: FileRange) -> Any:
    with open_zip(place) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{place.label} is a zip file but not one of torch.save: it holds {len(pickles)} data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        order = members.get(prefix + "byteorder")
        if order is not None and stored_range(place, order, f"{place.label}/byteorder").content(8) != b"little":
            raise UserError(f"{place.label} was saved on a big-endian machine: load and save it on another first")

        records: dict[tuple[str, torch.dtype, int], StorageRecord] = {}  # one, however often it is referred to

        def storage(persistent_id: Any) -> StorageRecord:
            key, dtype, numel = found = _storage_id(persistent_id, 5)
            if found in records:
                return records[found]
            member = members.get(f"{prefix}data/{key}")
            if member is None:
                raise DamagedFileError(f"{place.label} is damaged: storage {brief(key)} is missing")
            bytes_there, nbytes = stored_range(place, member, f"{place.label}/data/{key}"), numel * dtype.itemsize
            if nbytes > bytes_there.length:
                held = f"holds {bytes_there.length} bytes instead of {nbytes}"
                raise DamagedFileError(f"{place.label} is damaged: storage {brief(key)} {held}")
            return records.setdefault(found, StorageRecord(key, dtype, nbytes, bytes_there, member.CRC))

        pickled = stored_range(place, members[pickles[0]], f"{place.label}/data.pkl")
        if pickled.length > _LONGEST_PICKLE:
            raise UserError(f"{place.label} is not a checkpoint: its structure alone takes {pickled.length:,} bytes")
        with pickled.open() as file:
            return load_pickle(file, torch_vocabulary(storage), place.label)


def _storage_id(persistent_id: Any, length: int) -> tuple[str, torch.dtype, int]:
    """Key, element type and number of elements of ``('storage', type, key, location, numel, ...)``."""
    if isinstance(persistent_id, tuple) and len(persistent_id) == length:
        kind, dtype, key, _, numel = persistent_id[:5]
        if kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str) and isinstance(numel, int):
            if 0 <= numel < 1 << 48:
                return key, dtype, numel
            raise ValueError("a storage of a strange size")
    raise ValueError("a reference to something that is not a storage")


# ---------------------------------------------------------------- stream container


def _load_stream(place: FileRange) -> Any:
    records: dict[str, StorageRecord] = {}

    def storage(persistent_id: Any) -> StorageRecord:
        key, dtype, numel = _storage_id(persistent_id, 6)
        if persistent_id[5] is not None:
            # Views of a storage had ids of their own in torch 0.3 and before; Megatron never ran on it.
            raise ValueError("a view of a storage")
        return records.setdefault(key, StorageRecord(key, dtype, numel * dtype.itemsize))

    plain = Vocabulary()
    with place.open() as file:
        file.seek(len(_STREAM_START))
        if load_pickle(file, plain, place.label) != _STREAM_PROTOCOL:
            raise UserError(
                f"{place.label} was saved by an unknown version of torch: load and save it with a newer one"
            )
        system = load_pickle(file, plain, place.label)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise UserError(f"{place.label} was saved on a big-endian machine: load and save it on another first")
        value = load_pickle(file, torch_vocabulary(storage), place.label)
        keys = load_pickle(file, plain, place.label)
        start = file.tell()
    _place_storages(place, keys, records, start)
    return value


def _place_storages(place: FileRange, keys: Any, records: dict[str, StorageRecord], start: int) -> None:
    """Give every storage its place: in the order of ``keys``, each behind its number of elements."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(records):
        raise DamagedFileError(f"{place.label} is damaged: its list of storages does not fit its tensors")
    for key in keys:
        record = records[key]
        (count,) = struct.unpack("<q", place.read(start, 8))
        if count * record.dtype.itemsize != record.nbytes:
            raise DamagedFileError(
                f"{place.label} is damaged: storage {brief(key)} has {count} elements instead of "
                f"{record.nbytes // record.dtype.itemsize}"
            )
        record.place = place.part(start + 8, record.nbytes)
        start += 8 + record.nbytes
