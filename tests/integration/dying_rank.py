# SPDX-License-Identifier: Apache-2.0
"""The `megatron-bert` command with one rank that breaks in the middle of a step.

The environment says which and how: BREAK_RANK, BREAK_ACTION such as 1B2, BREAK_STEP, and BREAK_HOW (kill or raise).
Every rank leaves a file with its process id in BREAK_FOLDER, and the one that breaks the moment at which it did.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_bert.cli import main
from parallel.pipeline.actions import Action
from parallel.pipeline.engine import PipelineEngine


def break_at_action() -> None:
    """Let the engine of the rank break."""
    compute = PipelineEngine._compute
    seen = 0

    def breaking(engine: PipelineEngine, action: Action, *arguments: Any) -> Any:
        nonlocal seen
        if str(action) == os.environ["BREAK_ACTION"]:
            seen += 1
            if seen == int(os.environ["BREAK_STEP"]):
                (Path(os.environ["BREAK_FOLDER"]) / "moment").write_text(str(time.time()))
                if os.environ["BREAK_HOW"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ArithmeticError("this rank breaks here")
        return compute(engine, action, *arguments)

    PipelineEngine._compute = breaking  # type: ignore[method-assign]


def prepare() -> None:
    """Do as the environment says."""
    (Path(os.environ["BREAK_FOLDER"]) / f"rank_{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == os.environ["BREAK_RANK"]:
        break_at_action()


if __name__ == "__main__":
    prepare()
    sys.exit(main())
