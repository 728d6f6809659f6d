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


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    """In their order, since some read what those before them wrote."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert COMMANDS
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "megatron-bert"
        ended = run_command(*arguments, folder=tmp_path)
        assert ended.code == 0, f"{command}\n{ended.text}"
