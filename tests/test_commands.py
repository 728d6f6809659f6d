# SPDX-License-Identifier: Apache-2.0
"""Commands in forked processes: where they run, what they say, and how they end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands import run_command


def test_runs_in_its_folder_and_leaves_this_process_as_it_is(tmp_path: Path) -> None:
    here = os.getcwd()
    arguments = ["schedule", "--pipeline", "2", "--microbatches", "4", "--schedule", "gpipe", "--trace", "trace.json"]
    done = run_command(*arguments, folder=tmp_path)
    assert done.code == 0, done.text
    assert "gpipe" in done.text
    assert (tmp_path / "trace.json").is_file()
    assert os.getcwd() == here


def test_a_refusal(tmp_path: Path) -> None:
    done = run_command("pretrain", "missing.yaml", folder=tmp_path)
    assert done.code == 2
    assert done.text.startswith("megatron-bert pretrain: cannot read the settings file missing.yaml: ")
    assert done.text.count("\n") == 1


def test_arguments_that_are_none(tmp_path: Path) -> None:
    done = run_command("pretrian", folder=tmp_path)
    assert done.code == 2
    assert "invalid choice: 'pretrian'" in done.text


def test_a_command_without_an_end_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(TimeoutError, match=r"pretrain fifo\.yaml took longer than 0\.5 seconds"):
        run_command("pretrain", "fifo.yaml", folder=tmp_path, timeout=0.5)
