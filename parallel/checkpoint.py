"""Sharded checkpoints over torch.distributed.checkpoint: what is one, and its state.

A checkpoint is a directory ``step_00000100`` with one file a rank, torch's ``.metadata`` and ``state.json``. It is
written as ``step_00000100.partial`` and renamed when every rank's data is on disk, so a directory of the final name is
always whole. Tensors are stored by global name and shape, so any layout can load what any other saved.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from parallel.errors import UserError, brief

STATE_FILE = "state.json"
_LONGEST_STATE = 64 << 20
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_step(path: Path) -> int | None:
    """The step of a whole checkpoint directory; None for anything else."""
    match = _NAME.fullmatch(path.name)
    if match is None or not (path / ".metadata").is_file() or not (path / STATE_FILE).is_file():
        return None
    return int(match.group(1))


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """Step -> directory of every whole checkpoint in ``root``, the newest last; {} where there is no ``root``."""
    if not root.is_dir():
        return {}
    return dict(sorted((step, path) for path in root.iterdir() if (step := checkpoint_step(path)) is not None))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint in ``root``, or None."""
    return next(reversed(whole_checkpoints(root).values()), None)


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        UserError: the directory is not a whole checkpoint.
    """
    try:
        with (path / STATE_FILE).open(encoding="utf-8") as file:
            text = file.read(_LONGEST_STATE)
            if file.read(1):
                raise ValueError(f"more than {_LONGEST_STATE:,} characters")
        state = json.loads(text)
    except OSError:
        raise UserError(f"{path} is not a checkpoint: it holds no {STATE_FILE}; give a step_... directory") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / STATE_FILE} is damaged ({brief(error)}): use another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path / STATE_FILE} is damaged (not a JSON object): use another checkpoint")
    return state
