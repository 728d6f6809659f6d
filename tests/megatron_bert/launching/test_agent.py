# SPDX-License-Identifier: Apache-2.0
"""What torchrun's agent starts again, and what not."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

from megatron_bert.launching.agent import main
from megatron_bert.launching.launched import LOG_VARIABLE
from tests.worlds import run_world

#: A rank that notes its start, and fails as the records or its exit code say; without torch, to be quick.
RANK = """
import os, sys
from megatron_bert.launching.launched import launched_process
open("starts", "a").write(os.environ["RANK"])
count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
{body}
"""
SAME = "with launched_process():\n    raise ArithmeticError('again')"
OTHER = "with launched_process():\n    assert count == 2, count"


@pytest.mark.parametrize(
    ("body", "starts", "code", "words"),
    [
        ("sys.exit(2)", 1, 2, "not started again: it was refused"),
        (SAME, 2, 1, "not started again: the start before it failed in the same way"),
        (OTHER, 3, 0, ""),
        ("os.kill(os.getpid(), 9)", 4, 1, ""),
    ],
    ids=["refused", "repeated", "other failures", "killed"],
)
def test_starts(tmp_path: Path, body: str, starts: int, code: int, words: str) -> None:
    (tmp_path / "rank.py").write_text(RANK.format(body=body))
    run_world(1, run_agent, tmp_path, timeout=120)
    assert (tmp_path / "starts").read_text() == "0" * starts
    assert int((tmp_path / "code").read_text()) == code
    said = (tmp_path / "said").read_text()
    assert words in said
    assert "Traceback" not in said


def run_agent(folder: Path) -> None:
    """In a process that has loaded torch already."""
    os.chdir(folder)
    os.environ |= {LOG_VARIABLE: "logs", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = ["--standalone", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.05"]
    with Path("said").open("w") as said, contextlib.redirect_stderr(said):
        Path("code").write_text(str(main([*options, "rank.py"])))
