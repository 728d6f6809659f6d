# SPDX-License-Identifier: Apache-2.0
"""Which task a name means, and how tasks are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.classification import ClassificationTask
from megatron_bert.tasks.encoding import BERT, InputFormat
from megatron_bert.tasks.glue import GlueTask
from megatron_bert.tasks.multiple_choice import MultipleChoiceTask
from megatron_bert.tasks.question_answering import QuestionAnsweringTask
from megatron_bert.tasks.settings import GLUE_NAMES, TaskDataSettings, TaskSettings
from megatron_bert.tasks.task import Task
from megatron_bert.tasks.token_classification import TokenClassificationTask
from parallel.errors import UserError

TASKS: dict[str, type[Task]] = {
    **dict.fromkeys(GLUE_NAMES, GlueTask),
    "classification": ClassificationTask,
    "regression": ClassificationTask,
    "multiple_choice": MultipleChoiceTask,
    "question_answering": QuestionAnsweringTask,
    "token_classification": TokenClassificationTask,
}
"""Task name -> its class; one line a task."""


def build_task(settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT) -> Task:
    """The task the settings name. Reads the training file where labels are to be found in it.

    Raises:
        UserError: data settings that mean nothing to the task, missing files, or bad rows.
    """
    try:
        data.check_used_by(settings.name)
    except ValueError as error:
        raise UserError(f"{error}") from None
    given = [("directory", data.directory)] if data.directory is not None else []
    given += [(split, path) for split in ("train", "valid", "test") for path in data.files(split)]
    for name, path in given:
        if not path.exists():
            raise UserError(f"data.{name} is {path}, which does not exist: give an existing file or directory")
    return TASKS[settings.name](settings, data, tokenizer, form)


def restore_task(
    described: Mapping[str, Any],
    tokenizer: Tokenizer,
    data: TaskDataSettings | None = None,
    form: InputFormat = BERT,
) -> Task:
    """Rebuild a task from `Task.describe()`.

    Args:
        described: what `describe` returned.
        tokenizer: the saved model's.
        data: files to evaluate on; none when unset, for rows of a stream.
        form: how the model's inputs are laid out.

    Raises:
        UserError: `described` is not such a description.
    """
    try:
        settings = TaskSettings.model_validate(described["settings"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"this does not describe a task ({error}): expected what fine-tuning saved") from None
    return build_task(settings, data or TaskDataSettings(), tokenizer, form)
