# SPDX-License-Identifier: Apache-2.0
"""The model that a run directory stands for: of a task the one it has left, of several runs that of the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bert.model.configuration import CONFIG_NAME
from parallel.errors import UserError

#: What a fine-tuning run writes last of all, and a command of several runs beside them.
RESULTS_FILE = "results.json"
#: Folder of a fine-tuning run with the model of its best checkpoint.
MODEL_FOLDER = "model"
#: Endings of a model's files that are taken with the settings beside them.
_WITH_SETTINGS = (".safetensors", ".bin", ".json")


def settings_file(place: Path) -> Path | None:
    """The config.json in a model's directory, or beside one of its files; None where there is none."""
    if not place.is_dir() and place.suffix not in _WITH_SETTINGS:
        return None
    path = (place if place.is_dir() else place.parent) / CONFIG_NAME
    return path if path.is_file() else None


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The results of a finished run; None of any other."""
    path = run_dir / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def finished_model(source: Path) -> Path:
    """The directory of the model that a path stands for: of a fine-tuning run that in it, of several that of the best.

    Any other path stands for itself.

    Raises:
        UserError: the summary of several runs is damaged, or names no best one.
    """
    for directory in (source, source / MODEL_FOLDER):
        if (directory / CONFIG_NAME).is_file():
            return directory
    try:
        results = read_results(source) or {}
        runs, best = list(results.get("runs", ())), results.get("best")
        model = source / best["name"] / MODEL_FOLDER if best else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{source / RESULTS_FILE} is damaged ({error}): give the directory of one run") from None
    if not runs:
        return source
    if model is None:
        raise UserError(f"{source} holds several runs, and no best one: give one of {', '.join(runs)} in it")
    return model
