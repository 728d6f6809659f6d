"""The command line for tests: each command in a process of its own, forked with its modules loaded already.

Starting Python and loading torch takes longer than most commands at the sizes of tests. Where the start itself is what
is tested, the program is run as a user runs it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_bert.cli import main
from tests.worlds import forkserver_context, preload

preload(
    "matplotlib.backends.backend_agg",
    "megatron_bert.finetuning.inference",
    "megatron_bert.quantizing.quantize",
    "megatron_bert.training.event_file",
)


class Ended(NamedTuple):
    """A command that has ended.

    Attributes:
        code: exit code; negative for the signal that killed it.
        text: standard output and error.
    """

    code: int
    text: str


def run_command(*arguments: str, folder: Path, timeout: float = 200.0) -> Ended:
    """Run ``megatron-bert`` with arguments in a folder.

    Raises:
        TimeoutError: it took longer than ``timeout`` seconds, and was killed.
    """
    with tempfile.NamedTemporaryFile(mode="r", prefix="command-", encoding="utf-8") as output:
        process = forkserver_context().Process(target=_run, args=(arguments, str(folder), output.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{' '.join(arguments)} took longer than {timeout} seconds:\n{output.read()}")
        return Ended(process.exitcode, output.read())


def _run(arguments: tuple[str, ...], folder: str, output: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["megatron-bert", *arguments]
    sys.exit(main())
