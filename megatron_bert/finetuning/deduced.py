"""What a model that transformers has fine-tuned was fine-tuned for, from its config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bert.data.tokenizer_settings import CONFIG_NAME as TOKENIZER_SETTINGS
from megatron_bert.data.tokenizer_settings import read_settings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.tasks.settings import (
    GLUE_NAMES,
    KINDS,
    MAX_LENGTHS,
    Kind,
    meaningful,
    meaningful_data,
    task_name,
)
from parallel.errors import UserError

#: What the name of a class ends in -> the kind of task.
_HEADS: dict[str, Kind] = {
    "ForSequenceClassification": "sequence",
    "ForMultipleChoice": "multiple_choice",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}
#: Schemes of tags by prefixes that only they have.
_SCHEMES = (("BILOU", {"L", "U"}), ("IOBES", {"E", "S"}))


def has_head(described: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a class with the head of a task."""
    return _kind_of(_class_of(described)) is not None


def _class_of(described: Mapping[str, Any]) -> str:
    named = described.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _kind_of(name: str) -> Kind | None:
    return next((kind for ending, kind in _HEADS.items() if name.endswith(ending)), None)


def deduced_settings(
    directory: Path, described: Mapping[str, Any], config: MegatronBertConfig, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The section ``task`` of a model that transformers has saved.

    Args:
        directory: of the model.
        described: its config.json, which :func:`has_head`.
        config: the same.
        given: settings of the section that the user gives, which count more.

    Raises:
        UserError: the model is for no task that there is, or the user names a task with another head.
    """
    named = _class_of(described)
    kind = _kind_of(named)
    assert kind is not None
    problem, labels = config.problem_type, config.num_labels
    regression = kind == "sequence" and (problem == "regression" or (problem is None and labels == 1))
    if regression and labels > 1:
        raise UserError(f"{directory} predicts {labels} numbers for each text: only models for one number can be used")
    usual = kind if kind != "sequence" else "regression" if regression else "classification"
    name = task_name(given.get("name", usual))
    _check_kind(name, kind, directory, named, usual)
    found: dict[str, Any] = {"name": name, "max_length": _longest(directory, kind, config)}
    if name == "classification":
        found["multi_label"] = problem == "multi_label_classification"
    if name == "token_classification":
        found["scheme"] = _scheme(list((config.id2label or {}).values()))
    if kind in ("sequence", "token_classification") and not regression and name not in GLUE_NAMES:
        found["labels"] = [label for _, label in sorted((config.id2label or {}).items())]
    return found | {key: value for key, value in given.items() if key != "name"}


def _check_kind(name: str, kind: Kind, directory: Path, named: str, usual: str) -> None:
    if KINDS.get(name, kind) != kind:
        raise UserError(
            f"task.name is {name}, but {directory} is a {named}: give a task with such a head, such as {usual}, or "
            "leave it out"
        )


def changed_settings(
    directory: Path,
    saved: Mapping[str, Any],
    how: Mapping[str, Any],
    described: Mapping[str, Any],
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section ``task`` of a model that was fine-tuned here, with the changes of a user, and how its files are read.

    Under another name, what the saved task was set to and the other does not have is left out, and its classes are
    those of the model.

    Args:
        directory: of the model.
        saved: the section as it was saved.
        how: of the section ``data``, how the training file was read.
        described: config.json of the model.
        given: settings of the section that the user gives.

    Raises:
        UserError: the user names a task with another head.
    """
    before = str(saved["name"])
    name = task_name(given.get("name", before))
    if name == before or name not in KINDS:
        return {**saved, **given}, dict(how)
    _check_kind(name, KINDS[before], directory, _class_of(described), before)
    found = meaningful(saved, name)
    if name == "classification" and not found.get("labels"):
        found["labels"] = [label for _, label in sorted(described.get("id2label", {}).items(), key=_number)] or None
    return {**found, "name": name, **given}, meaningful_data(how, name)


def _number(item: tuple[Any, Any]) -> int:
    return int(item[0])


def _longest(directory: Path, kind: Kind, config: MegatronBertConfig) -> int:
    """What the model and its tokenizer take; windows of long texts have the length that transformers gives them."""
    stated = read_settings(directory / TOKENIZER_SETTINGS).get("model_max_length")
    longest = config.longest_sequence
    if type(stated) is int and 0 < stated < longest:
        longest = stated
    return min(longest, MAX_LENGTHS[kind]) if kind == "question_answering" else longest


def _scheme(tags: list[str]) -> str:
    """The scheme of some tags; BIO where several could be meant."""
    prefixes = {found[1] for tag in tags if (found := re.match(r"([A-Z])-", tag))}
    for scheme, own in _SCHEMES:
        if prefixes & own:
            return scheme
    return "IO" if prefixes == {"I"} else "BIO"


def told(directory: Path, described: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """One line on what was found, for the user."""
    labels = settings.get("labels")
    shown = f" of {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}" if labels else ""
    name = f"multi-label {settings['name']}" if settings.get("multi_label") else settings["name"]
    floating = "; computed in floating point, not in integers" if described.get("quant_mode") else ""
    return (
        f"{directory} is a {_class_of(described)}, used for {name}{shown}, in sequences of at most "
        f"{settings['max_length']} tokens (task.key=value changes that){floating}"
    )
