# SPDX-License-Identifier: Apache-2.0
"""What a model was fine-tuned for that does not say so itself, from its head and the names of its classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bert.convert.huggingface_names import family_of
from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.vocabularies import SETTINGS_NAME, read_settings
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.tasks.settings import meaningful, meaningful_data, task_name
from megatron_bert.tasks.table import GLUE_NAMES, TASKS, has_setting
from megatron_bert.tasks.tag_schemes import looks_like_tag
from parallel.errors import UserError, brief, first_of, with_article

#: Schemes of tags by prefixes that only they have.
_SCHEMES = (("BILOU", {"L", "U"}), ("IOBES", {"E", "S"}))


def deduced_settings(state: CanonicalState, given: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``task`` of a fine-tuned model that does not say what it was fine-tuned for.

    Args:
        state: of the model, which has the head of a task.
        given: settings of the section that the user gives, which count more.

    Raises:
        UserError: the model is for no task that there is, or the user names a task with another head.
    """
    assert state.head is not None
    config, problem, labels = state.config, state.config.problem_type, state.config.num_labels
    usual = next((name for name, kind in TASKS.items() if kind.head == state.head and name not in GLUE_NAMES), None)
    if usual is None:
        raise UserError(f"{state.label} has the head of a {state.head}, which no task uses")
    regression = usual == "classification" and (problem == "regression" or (problem is None and labels == 1))
    if regression and labels > 1:
        raise UserError(
            f"{state.label} predicts {labels} numbers for each text: only models for one number can be used"
        )
    usual = "regression" if regression else usual
    name = task_name(given.get("name", usual))
    _check_head(name, state, usual)
    found: dict[str, Any] = {"name": name, "max_length": _longest(Path(state.label), usual, config)}
    if name == "classification":
        found["multi_label"] = problem == "multi_label_classification"
    if name == "token_classification":
        strange = [name for name in _labels(config) if not looks_like_tag(name)]
        if strange and "labels" not in given:
            raise UserError(
                f"{state.label} has a class {brief(repr(strange[0]), 40)}, which is not the tag of an entity: say "
                f"which tags its {labels} classes are, in their order, such as task.labels=[O,B-PER,I-PER]"
            )
        found["scheme"] = _scheme(given.get("labels") or _labels(config))
    if name in TASKS and has_setting(name, "settings", "labels") and not regression:
        found["labels"] = _labels(config)
    return found | {key: value for key, value in given.items() if key != "name"}


def _labels(config: MegatronBertConfig) -> list[str]:
    return [label for _, label in sorted((config.id2label or {}).items())]


def class_of(state: CanonicalState) -> str:
    """The class of transformers that a model is of, or would be."""
    assert state.head is not None
    return state.facts.architecture or family_of(state.config).classes + HEADS[state.head].class_ending


def _check_head(name: str, state: CanonicalState, usual: str) -> None:
    if name in TASKS and TASKS[name].head != state.head:
        raise UserError(
            f"task.name is {name}, but {state.label} is {with_article(class_of(state))}: give a task with such a head, "
            f"such as {usual}, or leave it out"
        )


def changed_settings(
    state: CanonicalState, saved: Mapping[str, Any], how: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section ``task`` of a model that was fine-tuned here, with the changes of a user, and how its files are read.

    Under another name, what the saved task was set to and the other does not have is left out, and its classes are
    those of the model.

    Args:
        how: of the section ``data``, how the training file was read.

    Raises:
        UserError: the user names a task with another head.
    """
    before = str(saved["name"])
    name = task_name(given.get("name", before))
    if name == before or name not in TASKS:
        return {**saved, **given}, dict(how)
    _check_head(name, state, before)
    found = meaningful(saved, name)
    if name == "classification" and not found.get("labels"):
        found["labels"] = _labels(state.config)
    return {**found, "name": name, **given}, meaningful_data(how, name)


def _longest(directory: Path, usual: str, config: MegatronBertConfig) -> int:
    """What the model and its tokenizer take; windows of long texts have the length that transformers gives them."""
    stated = read_settings(directory / SETTINGS_NAME).get("model_max_length")
    longest = config.longest_sequence
    if type(stated) is int and 0 < stated < longest:
        longest = stated
    return min(longest, TASKS[usual].max_length) if usual == "question_answering" else longest


def _scheme(tags: list[str]) -> str:
    """The scheme of some tags; BIO where several could be meant."""
    prefixes = {found[1] for tag in tags if (found := re.match(r"([A-Z])-", tag))}
    for scheme, own in _SCHEMES:
        if prefixes & own:
            return scheme
    return "IO" if prefixes == {"I"} else "BIO"


def deduction_note(state: CanonicalState, settings: Mapping[str, Any]) -> str:
    """One line on what was found, for the user."""
    labels = settings.get("labels")
    shown = f" of {first_of(labels, 12)}" if labels else ""
    name = f"multi-label {settings['name']}" if settings.get("multi_label") else settings["name"]
    found = (
        f"{state.label} is {with_article(class_of(state))}, used for {name}{shown}, in sequences of at most "
        f"{settings['max_length']} tokens (task.key=value changes that)"
    )
    return "; ".join([found, *state.warnings])
