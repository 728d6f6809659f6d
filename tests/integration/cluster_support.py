# SPDX-License-Identifier: Apache-2.0
"""What tests that need a machine of their own share: whether they can run, and running once for several workers."""

from __future__ import annotations

import fcntl
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

#: Continuous integration sets it: a test that cannot run there is a failure, not skipped.
REQUIRED = "MEGATRON_BERT_REQUIRE_CLUSTER_TESTS"


def need(programs: tuple[str, ...], packages: str) -> None:
    """Skip the test, or fail it where it is required, unless this is root and the programs are there."""
    missing = [name for name in programs if shutil.which(name) is None]
    if os.geteuid() != 0:
        reason = "needs to be root"
    elif missing:
        reason = f"{', '.join(missing)} not found: apt-get install {packages}"
    else:
        return
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason} ({REQUIRED} is set)")
    pytest.skip(reason)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Of all workers of this run of the tests."""
    base = factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


def once(folder: Path, work: Callable[[Path], object]) -> Path:
    """Do something in a folder once, whichever of several processes comes first; the others wait for it.

    Returns:
        The folder.

    Raises:
        RuntimeError: it failed, in this process or another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = folder / "outcome"
        if not outcome.exists():
            try:
                work(folder)
            except BaseException:
                outcome.write_text(traceback.format_exc())
                raise
            outcome.write_text("done")
        if outcome.read_text() != "done":
            raise RuntimeError(f"failed in another process:\n{outcome.read_text()}")
    return folder
