# SPDX-License-Identifier: Apache-2.0
"""The table of tasks. Adding one is a file with a :class:`~megatron_bert.tasks.task.Task`, and an entry here."""

from __future__ import annotations

from typing import NamedTuple


class TaskKind(NamedTuple):
    """What is known of a task before its class is loaded.

    Attributes:
        place: of its class, ``module:name``.
        head: name of its kind of head.
        max_length: longest sequence in tokens, when unset.
        settings, data, columns: which settings it has of those that only some tasks have, in the sections ``task``,
            ``data`` and ``data.columns``.
    """

    place: str
    head: str
    max_length: int
    settings: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


GLUE_NAMES = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
_ROOM = "megatron_bert.tasks."
_TABLE = ("format", "columns", "header")
_TEXT = ("id", "text", "text_pair", "label")


def _glue(name: str) -> TaskKind:
    settings = () if name == "stsb" else ("class_weights",)
    return TaskKind(f"{_ROOM}glue:GlueTask", "sequence", 128, settings, ("directory",))


TASKS: dict[str, TaskKind] = {
    **{name: _glue(name) for name in GLUE_NAMES},
    "classification": TaskKind(
        f"{_ROOM}classification:ClassificationTask",
        head="sequence",
        max_length=128,
        settings=("labels", "multi_label", "label_threshold", "class_weights"),
        data=(*_TABLE, "label_separator"),
        columns=_TEXT,
    ),
    "regression": TaskKind(
        f"{_ROOM}classification:ClassificationTask", head="sequence", max_length=128, data=_TABLE, columns=_TEXT
    ),
    "multiple_choice": TaskKind(
        f"{_ROOM}multiple_choice:MultipleChoiceTask",
        head="choice",
        max_length=512,
        settings=("max_query_length",),
        data=(*_TABLE, "directory"),
        columns=("id", "label", "question", "context", "choices"),
    ),
    "question_answering": TaskKind(
        f"{_ROOM}question_answering:QuestionAnsweringTask",
        head="span",
        max_length=384,
        settings=(
            *("doc_stride", "max_query_length", "max_answer_length", "n_best", "answer_by"),
            *("no_answer", "null_threshold"),
        ),
        data=("columns",),
        columns=("id", "question", "context", "answers"),
    ),
    "token_classification": TaskKind(
        f"{_ROOM}token_classification:TokenClassificationTask",
        head="token",
        max_length=128,
        settings=("labels", "class_weights", "doc_stride", "scheme", "decoding"),
        data=_TABLE,
        columns=("id", "token", "tag"),
    ),
}
"""Task name -> what is known of it."""


def has_setting(name: str, section: str, field: str) -> bool:
    """Whether the task of a name has a setting: those that no task claims are of all.

    Args:
        section: ``settings``, ``data`` or ``columns``.
    """
    if field in getattr(TASKS[name], section):
        return True
    return not any(field in getattr(kind, section) for kind in TASKS.values())
