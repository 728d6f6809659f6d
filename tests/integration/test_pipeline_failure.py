# SPDX-License-Identifier: Apache-2.0
"""One rank of a pipeline breaks in the middle of a step of the real command: all of them end soon, and say where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import Ended, run_ranks
from tests.integration.dying_rank import prepare
from tests.megatron_bert.training.layouts import Case, make_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(__file__).with_name("dying_rank.py")
#: Seconds in which every rank must have ended, from the moment at which one broke: on a busy machine too, but far from
#: the ten minutes that collectives wait.
BOUND = 120.0
#: What a rank says that fails in its pipeline.
COMPLAINT = re.compile(
    r"PipelineError: pipeline rank (\d) \(rank (\d)\) failed at (\d[FBIW]\d) of schedule 1f1b, while (.*)\n"
    r"((?:rank \d\|.*\n)+)"
)


def _configuration(folder: Path, case: Case) -> Path:
    make_data(folder)
    path = folder / "config.yaml"
    path.write_text(case.settings(folder).dump(), encoding="utf-8")
    return path


def _variables(folder: Path, rank: int, action: str, how: str) -> dict[str, str]:
    return {
        "BREAK_FOLDER": str(folder),
        "BREAK_RANK": str(rank),
        "BREAK_ACTION": action,
        "BREAK_STEP": "2",
        "BREAK_HOW": how,
    }


def _seconds_since_the_break(folder: Path) -> float:
    return time.time() - float((folder / "moment").read_text())


def _running(folder: Path) -> list[str]:
    """Ranks whose processes are still there."""
    return [path.name for path in folder.glob("rank_*") if Path(f"/proc/{path.read_text()}").exists()]


def _complaints(text: str) -> dict[int, re.Match[str]]:
    """By rank; what torchrun puts before each line is taken off."""
    plain = re.sub(r"^\[rank\d+\]:\s?", "", text, flags=re.MULTILINE)
    return {int(match.group(2)): match for match in COMPLAINT.finditer(plain)}


def _assert_marked(complaint: re.Match[str]) -> None:
    """The grid marks the action, in the row of the pipeline rank."""
    pipeline_rank, _, action, _, grid = complaint.groups()
    rows = grid.splitlines()
    assert [row.count(f">{action}<") for row in rows] == [int(str(n) == pipeline_rank) for n in range(len(rows))]


#: Rank 3 is the second stage of the second data rank: only rank 1 talks to it in the pipeline, and ranks 0 and 2 meet
#: the failure elsewhere.
PLANE = Case(pipeline=2, data=2, microbatches=4, sharding="full")


def test_killed_under_torchrun(tmp_path):
    config = _configuration(tmp_path, Case(pipeline=2, microbatches=4))
    log = tmp_path / "log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run(
            [*launch, str(COMMAND), "pretrain", str(config)],
            env=environment | _variables(tmp_path, 1, "1B1", "kill"),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            timeout=240,
        )
    text = log.read_text()
    assert _seconds_since_the_break(tmp_path) < BOUND, text
    assert done.returncode != 0, text
    assert _running(tmp_path) == []
    complaints = _complaints(text)
    assert complaints, text
    for complaint in complaints.values():
        _assert_marked(complaint)
    assert 1 not in complaints


def _run(folder: Path, case: Case, rank: int, action: str, how: str) -> list[Ended]:
    """Without a launcher that stops the others."""
    config = _configuration(folder, case)
    variables = _variables(folder, rank, action, how)
    ended = run_ranks(
        case.ranks, "pretrain", str(config), folder=folder, before=prepare, timeout=BOUND, launched=False, **variables
    )
    assert _seconds_since_the_break(folder) < BOUND, ended
    return ended


def test_an_error_without_a_launcher(tmp_path):
    ended = _run(tmp_path, PLANE, 3, "1B1", "raise")
    assert all(one.code > 0 for one in ended), ended
    complaints = _complaints("".join(one.text for one in ended))
    for complaint in complaints.values():
        _assert_marked(complaint)
    assert complaints[3].group(1, 3, 4) == ("1", "1B1", "computing: ArithmeticError: this rank breaks here")


def test_killed_without_a_launcher(tmp_path):
    ended = _run(tmp_path, Case(pipeline=3, microbatches=4), 1, "1F2", "kill")
    codes, texts = zip(*ended)
    assert codes[1] == -9
    assert codes[0] > 0, texts[0]
    assert codes[2] > 0, texts[2]
    # Both neighbors were in the middle of the pipeline; each names itself, its action and what it waited for.
    for rank in (0, 2):
        complaint = _complaints(texts[rank])[rank]
        assert f"(rank {1})" in complaint.group(4)
        _assert_marked(complaint)
