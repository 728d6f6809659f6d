# SPDX-License-Identifier: Apache-2.0
"""Bytes of a file, read and mapped."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.errors import DamagedFileError
from parallel.stored.file_range import FileRange


@pytest.fixture
def place(tmp_path: Path) -> FileRange:
    """All but the first three bytes of a file of two pages."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 32)
    return FileRange.whole(path).part(3, 8189)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 8189), (4093, 4096), (5000, 7)])
def test_mapped_bytes_are_those_that_are_read(place: FileRange, start: int, length: int) -> None:
    assert bytes(place.map(start, length)) == bytes(place.read(start, length))
    with place.opened() as opened:
        assert bytes(opened.map(start, length)) == bytes(place.read(start, length))


def test_what_is_written_to_mapped_bytes_stays_in_memory(place: FileRange) -> None:
    before = place.path.read_bytes()
    place.map(10, 5)[:] = b"other"
    assert place.path.read_bytes() == before


def test_a_file_that_became_shorter_is_not_mapped(place: FileRange) -> None:
    place.path.write_bytes(b"short")
    with pytest.raises(DamagedFileError, match="became shorter while it was read"):
        place.map(4000, 100)
    with pytest.raises(DamagedFileError, match="should hold 100 bytes at offset 8100"):
        place.map(8100, 100)
