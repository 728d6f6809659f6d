# SPDX-License-Identifier: Apache-2.0
"""The settings in the documentation of tasks are settings there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.table import TASKS

TEXT = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_settings(block: str) -> None:
    content = yaml.safe_load(block)
    assert set(content) == {"task", "data"}
    task, data = TaskSettings(**content["task"]), TaskDataSettings(**content["data"])
    data.check_used_by(task.name)


def test_every_kind_has_a_block() -> None:
    names = [TaskSettings(**yaml.safe_load(block)["task"]).name for block in BLOCKS]
    assert {TASKS[name].head for name in names} == {kind.head for kind in TASKS.values()}


def test_settings_named_in_the_text() -> None:
    named = set(re.findall(r"`(task|data)\.(\w+)", TEXT))
    assert len(named) > 10
    for section, field in named:
        model = TaskSettings if section == "task" else TaskDataSettings
        assert field in model.model_fields, f"{section}.{field}"
