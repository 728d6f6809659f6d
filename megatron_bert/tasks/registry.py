# SPDX-License-Identifier: Apache-2.0
"""How tasks are built from settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tables import found_at
from megatron_bert.tasks.encoding import BERT, InputFormat
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.table import TASKS
from megatron_bert.tasks.task import Task
from parallel.errors import UserError


def build_task(settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT) -> Task:
    """The task the settings name. Reads the training file where labels are to be found in it.

    Raises:
        UserError: data settings that mean nothing to the task, missing files, or bad rows.
    """
    data.check_used_by(settings.name)
    given = [("directory", data.directory)] if data.directory is not None else []
    given += [(split, path) for split in ("train", "valid", "test") for path in data.files(split)]
    for name, path in given:
        if not path.exists():
            raise UserError(f"data.{name} is {path}, which does not exist: give an existing file or directory")
    kind: type[Task] = found_at(TASKS[settings.name].place)
    return kind(settings, data, tokenizer, form)


def restore_task(
    described: Mapping[str, Any], tokenizer: Tokenizer, data: TaskDataSettings | None = None, form: InputFormat = BERT
) -> Task:
    """Rebuild a task from `Task.describe()`.

    Args:
        data: files to evaluate on; none when unset, for rows of a stream.

    Raises:
        UserError: `described` is not such a description.
    """
    try:
        settings = TaskSettings.model_validate(described["settings"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"this does not describe a task ({error}): expected what fine-tuning saved") from None
    return build_task(settings, data or TaskDataSettings(), tokenizer, form)
