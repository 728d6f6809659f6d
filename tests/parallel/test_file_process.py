# SPDX-License-Identifier: Apache-2.0
"""A process that writes files: what it writes, how its end is noticed, and that it ends with the one that asked."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.file_process import FileProcess, Piece, write_pieces
from parallel.stored.torch_archive import tensor_archive

TENSORS = [torch.arange(12.0).view(3, 4), torch.tensor(7), torch.zeros(0, 3), torch.ones(5, dtype=torch.bfloat16)]


def pieces_of(tensors: list[Tensor]) -> tuple[list[Piece], bytes]:
    """The pieces of tensors, and the memory in which they lie one after the other."""
    pieces, memory = [], b""
    for tensor in tensors:
        pieces.append(tensor_archive(tuple(tensor.shape), tensor.dtype, len(memory)))
        memory += tensor.flatten().view(torch.uint8).numpy().tobytes()
    return pieces, memory


def shared(memory: bytes) -> int:
    descriptor = os.memfd_create("test")
    os.write(descriptor, memory or b"\0")
    return descriptor


@pytest.fixture
def process() -> Iterator[FileProcess]:
    pieces, memory = pieces_of(TENSORS)
    descriptor = shared(memory)
    process = FileProcess(descriptor, pieces)
    yield process
    process.close()
    os.close(descriptor)


@pytest.mark.parametrize("number", range(len(TENSORS)))
def test_an_archive_is_one_of_torch_and_of_zip(tmp_path: Path, number: int) -> None:
    (piece,), memory = pieces_of([TENSORS[number]])
    path = tmp_path / "file"
    sums = write_pieces(os.open(path, os.O_WRONLY | os.O_CREAT), [(piece, memoryview(memory))])
    data = path.read_bytes()
    assert len(data) == piece.length == sums.size
    assert len(piece.head) % 64 == 0  # so that what maps the file reads the values where they are
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    loaded = torch.load(path, weights_only=True)
    assert loaded.dtype == TENSORS[number].dtype
    assert torch.equal(loaded, TENSORS[number])


def test_tensors_of_more_than_4_gib_have_long_numbers(tmp_path: Path) -> None:
    piece = tensor_archive(((1 << 32) + 5,), torch.uint8)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(piece.head)
        file.seek(piece.nbytes, os.SEEK_CUR)
        file.write(piece.tail)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("archive/data/0")
        assert member.file_size == (1 << 32) + 5
    assert torch.load(path, weights_only=True, mmap=True).shape == ((1 << 32) + 5,)


def test_what_memory_holds_at_each_write_is_written(tmp_path: Path, process: FileProcess) -> None:
    pieces, memory = pieces_of(TENSORS)
    for name in ("first", "second"):
        sums = process.write(tmp_path / name)
        expected = tmp_path / "expected"
        values = ((piece, memoryview(memory)[piece.start : piece.start + piece.nbytes]) for piece in pieces)
        assert write_pieces(os.open(expected, os.O_WRONLY | os.O_CREAT), values) == sums
        assert (tmp_path / name).read_bytes() == expected.read_bytes()


def test_it_ends_quietly(tmp_path: Path, process: FileProcess, capfd: pytest.CaptureFixture[str]) -> None:
    process.write(tmp_path / "file")
    process.close()
    assert not process.alive
    assert capfd.readouterr() == ("", "")


def test_what_the_file_system_refuses(full_disk: Path) -> None:
    pieces, memory = pieces_of([torch.zeros(1 << 20)])
    descriptor = shared(memory)
    process = FileProcess(descriptor, pieces)
    with pytest.raises(OSError, match="No space left on device"):
        process.write(full_disk / "file")
    with pytest.raises(FileExistsError):
        process.write(full_disk / "file")
    assert process.alive
    process.close()
    os.close(descriptor)


def test_it_does_not_hear_signals_but_its_end_is_noticed(tmp_path: Path, process: FileProcess) -> None:
    process.write(tmp_path / "first")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(process.pid, number)
    process.write(tmp_path / "second")
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="the process that writes it was killed by signal 9"):
        process.write(tmp_path / "third")
    assert not process.alive


_TRAINER = """
import os, sys, time
from multiprocessing import reduction
from parallel.file_process import FileProcess, Piece
memory = os.memfd_create("test")
os.truncate(memory, 1 << 20)
process = FileProcess(memory, [Piece(0, 1 << 20, b"head", b"tail", 0, 0)])
process._prepared()
reduction.send_handle(process._connection, int(sys.argv[1]), process.pid)
print(process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_killed_trainer_while_it_writes() -> None:
    reader, writer = os.pipe()  # which nobody empties: the write lasts
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(writer)], stdout=subprocess.PIPE, text=True, pass_fds=[writer]
    )
    os.close(writer)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    os.read(reader, 1)
    assert Path(f"/proc/{pid}").exists()
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 30
    while not _gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _gone(pid)
    os.close(reader)


def _gone(pid: int) -> bool:
    """Whether a process has ended, collected by its parent or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
