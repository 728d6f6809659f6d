# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/planning.md run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import run_command

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/planning.md").read_text(encoding="utf-8"), re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, place: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "megatron-bert"
    ended = run_command(*arguments, folder=place)
    assert ended.code == 0, ended.text
