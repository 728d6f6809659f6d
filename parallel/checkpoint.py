# SPDX-License-Identifier: Apache-2.0
"""Sharded checkpoints over torch.distributed.checkpoint: what is one, and its state.

A checkpoint is a directory ``step_00000100`` with one file per rank, torch's ``.metadata`` and ``state.json``. It is
written as ``step_00000100.partial`` and renamed when every rank's data is on disk, so a directory of the final name is
always whole. Tensors are stored by global name and shape, so any layout can load what any other saved.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.errors import DamagedCheckpointError, DamagedFileError, UserError, brief
from parallel.manifest import MANIFEST_FILE, Manifest
from parallel.stored.distributed_files import LARGE, METADATA, read_metadata
from parallel.stored.file_range import FileRange

STATE_FILE = "state.json"
#: In the state of a checkpoint that was written with a manifest.
HAS_MANIFEST = "manifest"
_LONGEST_STATE = 64 << 20
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_step(path: Path) -> int | None:
    """The step of a whole checkpoint directory; None for anything else."""
    match = _NAME.fullmatch(path.name)
    if match is None or not (path / METADATA).is_file() or not (path / STATE_FILE).is_file():
        return None
    return int(match.group(1))


def named_checkpoints(root: Path) -> dict[int, Path]:
    """Step -> directory of everything that is called a checkpoint in ``root``, whole or not, the newest last."""
    if not root.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return dict(sorted((int(match.group(1)), path) for match, path in named if match is not None))


@contextmanager
def _as_checkpoint(path: Path) -> Iterator[None]:
    """Report a damaged file as damage of the checkpoint that it is in."""
    try:
        yield
    except DamagedFileError as error:
        raise DamagedCheckpointError(path, error.fault) from None


def check_files(path: Path) -> Manifest | None:
    """Look for files that are missing, or of another size, and read what describes the tensors.

    Returns:
        The checksums; None for a checkpoint of an older version.

    Raises:
        DamagedCheckpointError: anything is not as it was written.
    """
    with _as_checkpoint(path):
        for name in (STATE_FILE, METADATA):
            if not (path / name).is_file():
                raise DamagedFileError(f"{name} is missing")
        manifest = Manifest.read(path)
        if manifest is not None:
            manifest.check_files()
            manifest.check_range(METADATA)
    read_state(path)
    return manifest


def check_checkpoint(path: Path, *, everything: bool = False) -> Manifest | None:
    """Look for what is not as it was written.

    Args:
        everything: read all tensors too, not only what describes them.

    Returns:
        The checksums; None for a checkpoint of an older version, of whose tensors nothing is known.

    Raises:
        DamagedCheckpointError: anything is not as it was written.
    """
    manifest = check_files(path)
    with _as_checkpoint(path):
        if manifest is not None and everything:
            manifest.check_everything()
        read_metadata(FileRange.whole(path / METADATA), LARGE)
    return manifest


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """Step -> directory of every whole checkpoint in ``root``, the newest last; {} where there is no ``root``."""
    return {step: path for step, path in named_checkpoints(root).items() if checkpoint_step(path) is not None}


def latest_checkpoint(root: Path, last: float = math.inf) -> Path | None:
    """The newest whole checkpoint in ``root`` of a step up to the last that counts, or None."""
    return next((path for step, path in reversed(whole_checkpoints(root).items()) if step <= last), None)


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        DamagedCheckpointError: what is there is not what was saved.
        UserError: the directory is not a checkpoint.
    """
    try:
        with _as_checkpoint(path):
            manifest = Manifest.read(path)
            if manifest is not None:
                manifest.check_range(STATE_FILE)
        with (path / STATE_FILE).open(encoding="utf-8") as file:
            text = file.read(_LONGEST_STATE)
            if file.read(1):
                raise ValueError(f"more than {_LONGEST_STATE:,} characters")
        state = json.loads(text)
        if not isinstance(state, dict):
            raise ValueError("not a JSON object")
    except OSError:
        raise UserError(f"{path} is not a checkpoint: it holds no {STATE_FILE}; give a step_... directory") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(path, f"{STATE_FILE} is damaged: {brief(error)}") from None
    if manifest is None and state.get(HAS_MANIFEST):
        raise DamagedCheckpointError(path, f"{MANIFEST_FILE} is missing")
    return state
