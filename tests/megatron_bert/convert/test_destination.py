# SPDX-License-Identifier: Apache-2.0
"""Where results go: what is there is replaced whole or kept, and nothing is lost when something goes wrong."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.convert import conversion
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.destination import Destination
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.options import ReadOptions, WriteOptions
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, draw, write_checkpoint
from tests.megatron_bert.convert.support import all_tensors, assert_same_tensors

SIZES = Sizes(layers=2)
_OTHER = Sizes(layers=1, words=70)
_WORDS = ReadOptions(true_vocab_size=SIZES.words)
#: Every format, and ways of writing that leave files of other names.
_WAYS: dict[str, tuple[str, WriteOptions]] = {
    "native": ("native", WriteOptions()),
    "one-file": ("huggingface", WriteOptions()),
    "shards": ("huggingface", WriteOptions(max_shard_bytes=4000)),
    "core": ("megatron-core", WriteOptions()),
    "tensor-2": ("megatron", WriteOptions(tensor=2)),
    "tensor-1": ("megatron", WriteOptions()),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), draw(SIZES), SIZES)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, of other sizes."""
    return write_checkpoint(tmp_path_factory.mktemp("other"), draw(_OTHER, seed=1), _OTHER)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, torch.Tensor]:
    return all_tensors(source, true_vocab_size=SIZES.words)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _names(folder) if (folder / name).is_file()}


# ---------------------------------------------------------------- replacing


@pytest.mark.parametrize(
    ("old", "new"), [*itertools.pairwise([*_WAYS, "native"]), *itertools.pairwise(reversed(_WAYS))]
)
def test_a_checkpoint_takes_the_place_of_another_whole(
    tmp_path: Path, source: Path, other: Path, expected: dict[str, torch.Tensor], old: str, new: str
) -> None:
    convert(other, tmp_path / "result", to=_WAYS[old][0], write=_WAYS[old][1])
    to, write = _WAYS[new]
    with pytest.raises(UserError, match="not empty: name another folder, or give --overwrite"):
        convert(source, tmp_path / "result", to=to, read=_WORDS, write=write)
    convert(source, tmp_path / "result", to=to, read=_WORDS, write=write, overwrite=True)
    assert_same_tensors(all_tensors(tmp_path / "result"), expected)
    convert(source, tmp_path / "fresh", to=to, read=_WORDS, write=write)
    assert _names(tmp_path / "result") == _names(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "result"]


@pytest.mark.parametrize("way", _WAYS)
def test_files_of_the_user_stay(
    tmp_path: Path, source: Path, other: Path, expected: dict[str, torch.Tensor], way: str
) -> None:
    convert(other, tmp_path, to="huggingface", write=WriteOptions(max_shard_bytes=4000))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/today.txt").write_text("mine")
    (tmp_path / "vocab.txt").write_text("mine")
    os.mkfifo(tmp_path / "notes/pipe")
    to, write = _WAYS[way]
    report = convert(source, tmp_path, to=to, read=_WORDS, write=write, overwrite=True)
    assert "holds files that are not a checkpoint's, which stay: notes, vocab.txt" in str(report)
    assert {"notes/today.txt", "vocab.txt"} <= set(_names(tmp_path))
    assert_same_tensors(all_tensors(tmp_path), expected)
    assert not [name for name in _names(tmp_path) if "-of-" in name] or way == "shards"


def test_names_of_a_checkpoint_alone_are_the_users(
    tmp_path: Path, source: Path, expected: dict[str, torch.Tensor]
) -> None:
    for name in ("config.json", "manifest.json", "state.json"):
        (tmp_path / name).write_text('{"of": "another tool"}')
    convert(source, tmp_path, to="megatron", read=_WORDS, overwrite=True)
    assert {"config.json", "manifest.json", "state.json"} < set(os.listdir(tmp_path))
    convert(source, tmp_path, to="native", read=_WORDS, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".metadata", "__0_0.distcp", "config.json", "manifest.json", "state.json"]
    assert_same_tensors(all_tensors(tmp_path), expected)


def test_a_folder_that_replaces_itself(tmp_path: Path, source: Path, expected: dict[str, torch.Tensor]) -> None:
    convert(source, tmp_path / "model", to="native", read=_WORDS)
    for to, write in _WAYS.values():
        convert(tmp_path / "model", tmp_path / "model", to=to, write=write, overwrite=True)
        assert_same_tensors(all_tensors(tmp_path / "model"), expected)


def test_zip_files_are_replaced_whole(
    tmp_path: Path, source: Path, other: Path, expected: dict[str, torch.Tensor]
) -> None:
    convert(other, tmp_path / "model.zip", to="megatron")
    with pytest.raises(UserError, match="is there already: name another, or give --overwrite"):
        convert(source, tmp_path / "model.zip", to="megatron", read=_WORDS)
    convert(source, tmp_path / "model.zip", to="megatron-core", read=_WORDS, overwrite=True)
    assert_same_tensors(all_tensors(tmp_path / "model.zip"), expected)
    assert os.listdir(tmp_path) == ["model.zip"]


def test_what_would_be_lost_or_misread_is_refused_before_the_work(tmp_path: Path, source: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / "steps", draw(_OTHER), _OTHER, iteration=step)
    write_checkpoint(tmp_path / "deep/old", draw(_OTHER), _OTHER)
    write_checkpoint(tmp_path / "around", draw(_OTHER), _OTHER)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    convert(source, tmp_path / "run/checkpoints/step_00000007", to="native")
    before = _contents(tmp_path)
    for place, start, message in (
        ("steps", source, r"several checkpoints \(iter_0000001, iter_0000002\), which --overwrite would delete"),
        ("deep", source, "holds other files of Megatron checkpoints"),
        ("around", tmp_path / "around/release", "the source .* lies in .*around"),
        ("run", source, "is the directory of a run, whose newest checkpoint would be read"),
    ):
        with pytest.raises(UserError, match=message):
            convert(start, tmp_path / place, to="megatron", overwrite=True, dry_run=True)
    assert _contents(tmp_path) == before


# ---------------------------------------------------------------- errors on the way


@pytest.fixture(params=["alone", "with a file of the user's"])
def occupied(request: pytest.FixtureRequest, tmp_path: Path, other: Path) -> Path:
    """A folder with a checkpoint; exchanged as a whole, or file by file."""
    convert(other, tmp_path / "result", to="huggingface")
    if request.param != "alone":
        (tmp_path / "result/notes.txt").write_text("mine")
    return tmp_path / "result"


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SystemExit(1)])
def test_an_error_at_any_rename_brings_back_what_was_there(
    occupied: Path, source: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    before, count = _contents(occupied), itertools.count()
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if next(count) == at:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    try:
        convert(source, occupied, to="native", read=_WORDS, overwrite=True)
    except (UserError, SystemExit):
        assert next(count) > at
        assert _contents(occupied) == before
    else:
        assert next(count) <= at
    assert os.listdir(occupied.parent) == ["result"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_result_that_is_not_read_back_as_it_was_replaces_nothing(
    occupied: Path, source: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    before, write = _contents(occupied), FORMATS[to].write

    def corrupts(*arguments: Any) -> None:
        write(*arguments)
        path = max((p for p in arguments[1].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        value = bytes(draw(SIZES)["position"][3].numpy().data)
        content[content.index(value)] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(type(FORMATS[to]), "write", lambda _, *arguments: corrupts(*arguments))
    with pytest.raises(UserError, match=r"position_embeddings.weight is read with other values|checksum"):
        convert(source, occupied, to=to, read=_WORDS, overwrite=True)
    assert _contents(occupied) == before
    assert os.listdir(occupied.parent) == ["result"]


def test_a_result_that_something_else_hides_is_taken_back(
    occupied: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(occupied)
    monkeypatch.setattr(Destination, "_check_kept", lambda *_: None)
    monkeypatch.setattr(Destination, "_must_stay", lambda _: True)
    write_checkpoint(occupied / "deep", draw(_OTHER), _OTHER)
    before |= {f"deep/{name}": content for name, content in _contents(occupied / "deep").items()}
    with pytest.raises(UserError, match="several checkpoints"):
        convert(source, occupied, to="megatron", read=_WORDS, overwrite=True)
    assert _contents(occupied) == before


def test_of_two_conversions_at_once_one_is_refused(
    tmp_path: Path, source: Path, other: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = conversion.tqdm.update
    for name, to in (("result", "native"), ("result.zip", "megatron")):

        def overtaken(self: conversion.tqdm, nbytes: int, name: str = name, to: str = to) -> None:
            monkeypatch.setattr(conversion.tqdm, "update", advance)
            convert(source, tmp_path / name, to=to, read=_WORDS)

        monkeypatch.setattr(conversion.tqdm, "update", overtaken)
        with pytest.raises(UserError, match="was made by something else meanwhile"):
            convert(other, tmp_path / name, to=to)
        assert_same_tensors(all_tensors(tmp_path / name), expected)
    assert sorted(os.listdir(tmp_path)) == ["result", "result.zip"]


def test_files_with_the_names_of_temporary_ones_are_the_users(tmp_path: Path, source: Path) -> None:
    for name in (".result.partial", "result.partial", "result.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    before = _names(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion.tqdm, "update", lambda *_: sys.exit(143))  # what a signal does
        with pytest.raises(SystemExit):
            convert(source, tmp_path / "result", to="huggingface")
    assert _names(tmp_path) == before


# ---------------------------------------------------------------- destinations of all kinds


@pytest.mark.parametrize("way", ["native", "one-file", "tensor-2"])
def test_the_current_directory_and_links_to_folders(
    tmp_path: Path,
    source: Path,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    to, write = _WAYS[way]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    number = (tmp_path / "here").stat().st_ino
    convert(source, ".", to=to, read=_WORDS, write=write)
    convert(source, ".", to=to, read=_WORDS, write=write, overwrite=True)
    assert (tmp_path / "here").stat().st_ino == number
    assert_same_tensors(all_tensors(Path()), expected)
    (tmp_path / "target").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("target")
    convert(source, tmp_path / "link", to=to, read=_WORDS, write=write)
    convert(source, tmp_path / "link", to=to, read=_WORDS, write=write, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o750
    assert_same_tensors(all_tensors(tmp_path / "target"), expected)
    assert sorted(os.listdir(tmp_path)) == ["here", "link", "target"]


def _dangling(folder: Path, name: str = "link") -> Path:
    (folder / name).symlink_to("nowhere")
    return folder / name


def _folder_named_zip(folder: Path) -> Path:
    (folder / "model.zip").mkdir()
    return folder / "model.zip"


def _file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_dangling, r"link is a symbolic link to nowhere, which is not there: remove the link, or make that folder"),
        (_folder_named_zip, "model.zip is there already and no file: name a zip file, or a folder"),
        (_file, "file is a file: name a folder for the result"),
        (lambda folder: _dangling(folder, "link.zip"), r"link.zip is a symbolic link .* or name another file$"),
        (lambda folder: _file(folder) / "below", "file is a file, and nothing can be written below it; name a folder"),
        (lambda folder: _file(folder) / "far" / "below", "file is a file, and nothing can be written below it"),
        (lambda folder: folder / "not" / "there", "not is not there: make the folder first"),
        (lambda folder: folder / ("n" * 256), r"cannot be written \(File name too long"),
        (lambda folder: folder / ("n" * 256 + ".zip"), r"cannot be written \(File name too long"),
    ],
)
def test_destinations_that_cannot_be_are_refused_before_the_work(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    place = make(tmp_path)
    before = _names(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "missing", place, to="megatron", overwrite=True)
    assert _names(tmp_path) == before


def test_a_name_of_the_greatest_length(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / ("n" * 255), to="native")
    convert(source, tmp_path / ("n" * 251 + ".zip"), to="megatron")
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(UserError, match=r"cannot be read \(File name too long"):
        convert(tmp_path / ("n" * 256), tmp_path / "result", to="native")


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a small disk with the options of ``mount``."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "disk", str(place)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("mounting a small disk needs root")
        return place

    yield mounted
    while place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("way", _WAYS)
def test_a_disk_that_gets_full(
    tmp_path: Path, source: Path, disk: Callable[..., Path], way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    to, write = _WAYS[way]
    size = convert(source, tmp_path / "measured", to=to, read=_WORDS, write=write).nbytes
    place = disk(f"size={-(-size // 4096) * 4096}")
    with pytest.raises(UserError, match=r"result cannot be written \(No space left on device.*: nothing was changed"):
        convert(source, place / "result", to=to, read=_WORDS, write=write)
    assert list(place.iterdir()) == []
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes, but [\d,]+ are free there"):
        convert(source, place / "result.zip", to="megatron", read=_WORDS)
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_disk_without_inodes_and_a_disk_to_read_only(
    source: Path, disk: Callable[..., Path], expected: dict[str, torch.Tensor]
) -> None:
    place = disk("size=4M,nr_inodes=4")
    with pytest.raises(UserError, match=r"result cannot be written \(No space left on device"):
        convert(source, place / "result", to="megatron", read=_WORDS, write=WriteOptions(tensor=2))
    assert list(place.iterdir()) == []
    for number in range(3):
        (place / str(number)).touch()
    with pytest.raises(UserError, match=r"result cannot be written \(No space left on device"):
        convert(source, place / "result", to="native", read=_WORDS)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.raises(UserError, match="disk cannot be written to: choose another destination"):
        convert(source, place / "result", to="native", read=_WORDS)


def test_a_mount_point_is_a_destination(
    source: Path, disk: Callable[..., Path], expected: dict[str, torch.Tensor]
) -> None:
    place = disk("size=4M")
    for overwrite in (False, True):
        convert(source, place, to="native", read=_WORDS, overwrite=overwrite)
        assert_same_tensors(all_tensors(place), expected)
    assert sorted(os.listdir(place)) == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]
