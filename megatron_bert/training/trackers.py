# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers beside TensorBoard and metrics.jsonl: Weights & Biases, and MLflow. Neither is on by default.

A tracker gets rows of numbers and is closed; what it raises is a warning, never the end of a run. Their table is in
:mod:`megatron_bert.tables`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_bert.tables import TRACKERS, found_at
from parallel.errors import UserError
from parallel.whole_files import write_text

CONFIG_FILE = "config.yaml"


class Tracker(Protocol):
    """Where rows of metrics go."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step, by names such as ``train/loss``."""

    def close(self, failed: bool) -> None:
        """The process ends with the run, or with an error."""


class WandbTracker:
    """Weights & Biases; offline where ``WANDB_MODE=offline`` says so.

    Args:
        run_dir: directory of the run; the files lie in its folder ``wandb``, and its name is the run's.
    """

    def __init__(self, run_dir: Path, project: str, settings: Mapping[str, Any]) -> None:
        library = _library("wandb")
        self._run = library.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=_kept_id(run_dir / "wandb_id"),
            resume="allow",
            config=dict(settings),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; the step is a value too, since the service takes steps in ascending order alone."""
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """MLflow; what ``MLFLOW_TRACKING_URI`` names, or files in the run directory.

    Args:
        run_dir: directory of the run, whose name is the run's.
        project: name of the experiment.
    """

    def __init__(self, run_dir: Path, project: str, settings: Mapping[str, Any]) -> None:
        library = _library("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").resolve().as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = library.MlflowClient(tracking_uri=uri)
        kept = run_dir / "mlflow_id"
        if kept.is_file():
            self._id = kept.read_text(encoding="utf-8").strip()
            self._client.set_terminated(self._id, "RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(project)
        self._id = self._client.create_run(number, run_name=run_dir.name).info.run_id
        for name, value in _flat(settings):
            self._client.log_param(self._id, name, str(value)[:500])
        write_text(kept, f"{self._id}\n")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def open_trackers(names: list[str], run_dir: Path, project: str) -> dict[str, Tracker]:
    """The trackers of a run by name.

    Raises:
        UserError: a library is not installed, or refuses to start.
    """
    if not names:
        return {}
    config = run_dir / CONFIG_FILE
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = found_at(TRACKERS[name])(run_dir, project, settings)
        except UserError:
            raise
        except Exception as error:  # whatever the library raises: no server, no login, no space
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"logging.trackers: {name} does not start ({reason}): see to that, or leave it out"
            ) from error
    return opened


def check_trackers(names: Iterable[str]) -> None:
    """Whether the libraries are there, before a run begins.

    Raises:
        UserError: one cannot be imported.
    """
    for name in names:
        _library(name)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"logging.trackers names {name}, which cannot be imported ({error}): pip install 'megatron-bert[{name}]'"
        ) from None


def _kept_id(path: Path) -> str:
    """A name for the run that stays the same when it goes on."""
    if not path.is_file():
        write_text(path, f"{uuid.uuid4().hex[:16]}\n")
    return path.read_text(encoding="utf-8").strip()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in settings.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found
