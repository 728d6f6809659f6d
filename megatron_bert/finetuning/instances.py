# SPDX-License-Identifier: Apache-2.0
"""The tokenized data of a command, made once for all of its runs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from megatron_bert.tasks.task import Instance, Task
from parallel.errors import UserError


class TaskInstances:
    """Instances of the splits of a task, tokenized when they are first asked for."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._splits: dict[str, list[Instance]] = {}

    @cached_property
    def train(self) -> list[Instance]:
        """To train on.

        Raises:
            UserError: there are none.
        """
        instances = self.task.instances(self.task.examples("train"), train=True)
        if not instances:
            raise UserError("there is nothing to train on: data.train holds no labeled example")
        return instances

    def of(self, split: str) -> list[Instance]:
        """To score a split.

        Raises:
            UserError: there are none.
        """
        if split not in self._splits:
            self._splits[split] = self.task.instances(self.task.examples(split), train=False)
        if not self._splits[split]:
            raise UserError(f"data.{split} holds no example: give one with some, or leave it out")
        return self._splits[split]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes the training data what they are: the files' contents, and which part of them is used."""
        data = self.task.data
        return {
            "files": [entry["sha256"] for entry in self.task.data_fingerprints().get("train", [])],
            "held_out": [data.valid_fraction, data.test_fraction, data.split_seed],
            "instances": len(self.train),
        }
