# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test: the same random numbers each time, and no GPU tests without a GPU."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Tests run several processes at once, their own and those they start: threads of one get in the way of the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Memory of workers and programs in huge pages, where the kernel has them on request: most of starting Python and torch
# is waiting for memory, above all in virtual machines, and takes a fifth less.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

# Of the programs too that tests start: what they import is compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from tests.cheap_imports import COLLECT_AFTER  # isort: split

import pytest

from megatron_bert.starting import SIGNALS
from tests.pictures import leave_out_pictures


def pytest_collection_finish() -> None:
    """Let the garbage collector look at what tests make, and no longer at what they import."""
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
    gc.enable()


#: Handlers of signals in tests.
_usual: dict[int, Any] = {}


def pytest_configure() -> None:
    """Hear SIGINT, which a shell lets programs in the background ignore: tests send it, to this process and others."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _usual.update((number, signal.getsignal(number)) for number in SIGNALS)


@pytest.fixture(autouse=True)
def _usual_signals() -> None:
    """Training that fails keeps its handlers, for its process is about to end: not so in tests."""
    for number, handler in _usual.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch  # here, since the process that hands out tests to others needs none of it

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[dict[str, Any]]:
    """Yields what draws, by its place."""
    with pytest.MonkeyPatch.context() as patch:
        yield leave_out_pictures(patch.setattr)


@pytest.fixture
def pictures(_no_pictures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets runs in the process of this test draw."""
    for place, function in _no_pictures.items():
        monkeypatch.setattr(place, function)


@contextmanager
def _mounted(place: Path, *options: str) -> Iterator[Path]:
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounts a file system, which only root may")
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with _mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as place:
        yield place


@pytest.fixture
def one_name_left(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes one file or directory more, and no second one."""
    with _mounted(tmp_path / "names", "-t", "tmpfs", "-o", "size=1m,nr_inodes=2", "tmpfs") as place:
        yield place


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nothing can be written to, not even by root."""
    with _mounted(tmp_path / "read_only", "-t", "tmpfs", "-o", "ro", "tmpfs") as place:
        yield place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: workers then share out the short ones until the end, and none waits for another's long one.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
