# SPDX-License-Identifier: Apache-2.0
"""Tiny runs of the public `pretrain`, in this process or as the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_bert.config import Settings
from megatron_bert.training.memory import PARTS, PEAK
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from parallel.checkpoint import STATE_FILE, read_state
from parallel.checkpoint_reader import load_tensors
from parallel.stored.distributed_files import METADATA, read_metadata
from parallel.stored.file_range import FileRange
from tests.megatron_bert.training.layouts import Case

#: Depends on how long a step took, on the layout, or on what the process has done before.
TIMED = (
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "step_seconds_min",
    "step_seconds_median",
    "step_seconds_max",
    "slowest_rank",
    "slowest_host",
    *(f"memory_{part}" for part in (*PARTS, PEAK, "rank")),
)
STEPS = 6


def run_settings(folder: Path, run_dir: Path, **changes: Any) -> Settings:
    """Settings of a run over the data that ``layouts.make_data`` put in a folder.

    Args:
        folder: of the data.
        run_dir: of the run.
        **changes: values by ``section__key``.
    """
    tree = Case(depth=5).settings(folder).model_dump(by_alias=True)
    tree["model"] |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tree["training"] |= {"run_dir": run_dir, "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4}
    tree["logging"] |= {"every": 1, "tensorboard": False, "progress": False}
    tree["learning_rate"] |= {"schedule": "linear", "warmup_steps": 2}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return Settings.model_validate(tree)


def write_config(settings: Settings, path: Path) -> Path:
    path.write_text(settings.dump(), encoding="utf-8")
    return path


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl on training and evaluation, without what depends on the clock."""
    found = [row for row in read_metrics(run_dir / METRICS_FILE) if "checkpoint_bytes" not in row]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in found]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint of one process holds."""
    stored = read_metadata(FileRange.whole(checkpoint / METADATA))
    whole = {name: torch.full(entry.shape, torch.nan) for name, entry in stored.items()}
    load_tensors(checkpoint, whole)
    return whole


def assert_same_checkpoint(mine: Path, theirs: Path) -> None:
    """Equal bit for bit, but for the settings."""
    actual, expected = tensors(mine), tensors(theirs)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    states = [read_state(path) for path in (mine, theirs)]
    for state in states:
        del state["settings"]
    assert states[0] == states[1], STATE_FILE
