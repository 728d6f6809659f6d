# SPDX-License-Identifier: Apache-2.0
"""Every byte of a checkpoint is accounted for."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest

from parallel import manifest as module
from parallel.errors import DamagedFileError
from parallel.manifest import MANIFEST_FILE, FileSums, Manifest, SummingFile, write_manifest


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two files of ranks, in pieces of any size, and one that was written otherwise."""
    draw, known = random.Random(5), {}
    for name, pieces in (("a", [1, 63, 64, 200, 0, 7]), ("b", [64, 64]), ("empty", [])):
        with SummingFile((tmp_path / name).open("wb")) as file:
            for length in pieces:
                file.write(draw.randbytes(length))
        known[name] = file.sums()
    (tmp_path / "state.json").write_text(json.dumps({"step": 7}))
    write_manifest(tmp_path, known)
    return tmp_path


def found(directory: Path) -> Manifest:
    manifest = Manifest.read(directory)
    assert manifest is not None
    return manifest


def test_what_is_written_is_what_is_read(directory: Path) -> None:
    manifest = found(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["a", "b", "empty", MANIFEST_FILE, "state.json"]
    for name, expected in manifest.files.items():
        data = (directory / name).read_bytes()
        blocks = [data[at : at + 64] for at in range(0, len(data), 64)]
        assert expected == FileSums(len(data), tuple(map(zlib.crc32, blocks)))
    manifest.check_everything()
    assert sum(file.size for file in manifest.files.values()) == 335 + 128 + len(json.dumps({"step": 7}))


def test_any_flipped_bit_is_noticed(directory: Path) -> None:
    path = directory / "a"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedFileError, match=f"a has changed .*bytes {at // 64 * 64} to"):
            found(directory).check_everything()


def test_a_range_looks_at_its_own_blocks_once(directory: Path) -> None:
    manifest = found(directory)
    manifest.check_range("a", 64, 64)
    data = bytearray((directory / "a").read_bytes())
    data[70] ^= 1
    (directory / "a").write_bytes(data)
    manifest.check_range("a", 64, 64)
    for start, length in ((0, 64), (128, 100), (334, 1)):
        found(directory).check_range("a", start, length)
    for start, length in ((127, 1), (0, 65), (64, None)):
        with pytest.raises(DamagedFileError, match="has changed"):
            found(directory).check_range("a", start, length)


def test_missing_shorter_longer_and_strange_files(directory: Path) -> None:
    (directory / "b").write_bytes((directory / "b").read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="b holds 127 bytes instead of 128: use another checkpoint"):
        found(directory).check_files()
    with pytest.raises(DamagedFileError, match="b has changed"):
        found(directory).check_range("b")
    (directory / "b").unlink()
    with pytest.raises(DamagedFileError, match="b is missing"):
        found(directory).check_files()
    with pytest.raises(DamagedFileError, match="b cannot be read"):
        found(directory).check_range("b")
    with pytest.raises(DamagedFileError, match=r"other is not in manifest.json"):
        found(directory).check_range("other")
    (directory / "empty").write_bytes(b"x")
    with pytest.raises(DamagedFileError, match="empty has changed"):
        found(directory).check_range("empty", 0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"version": 2, "block_bytes": 64, "files": {}}',
        '{"version": 1, "block_bytes": 65, "files": {}}',
        '{"version": 1, "block_bytes": 64, "files": []}',
        '{"version": 1, "block_bytes": 64, "files": {"../a": {"bytes": 0, "crc32": ""}}}',
        '{"version": 1, "block_bytes": 64, "files": {"..": {"bytes": 0, "crc32": ""}}}',
        '{"version": 1, "block_bytes": 64, "files": {"a": {"bytes": -1, "crc32": ""}}}',
        '{"version": 1, "block_bytes": 64, "files": {"a": {"bytes": true, "crc32": "00000000"}}}',
        '{"version": 1, "block_bytes": 64, "files": {"a": {"bytes": 65, "crc32": "00000000"}}}',
        '{"version": 1, "block_bytes": 64, "files": {"a": {"bytes": 1, "crc32": "0000000g"}}}',
        '{"version": 1, "block_bytes": 64, "files": {"a": {"bytes": 1, "crc32": 0}}}',
        "[" * 100_000,
    ],
)
def test_damaged_manifests(directory: Path, text: str) -> None:
    (directory / MANIFEST_FILE).write_text(text)
    with pytest.raises(DamagedFileError, match=r"manifest.json is damaged .*use another checkpoint"):
        Manifest.read(directory)


def test_directories_without_one(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
