# SPDX-License-Identifier: Apache-2.0
"""The command line for tests: each command in a process of its own, forked with its modules loaded already.

Runs draw nothing there; tests of runs in their own process ask for pictures.

Starting Python and loading torch takes longer than most commands at the sizes of tests. Where the start itself is what
is tested, the program is run as a user runs it.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bert.cli import main
from tests.integration.slurm_cluster import free_ports
from tests.pictures import leave_out_pictures
from tests.worlds import forkserver_context, preload, prepare_process

preload(
    "matplotlib.backends.backend_agg",
    "megatron_bert.finetuning.inference",
    "megatron_bert.quantizing.quantize",
    "megatron_bert.training.event_file",
    "sklearn.metrics",
)


#: What a process runs, given its arguments.
_Program = Callable[[tuple[str, ...]], None]


class Ended(NamedTuple):
    """A command that has ended.

    Attributes:
        code: exit code; negative for the signal that killed it.
        text: standard output and error.
    """

    code: int
    text: str


def run_command(*arguments: str, folder: Path, stdout: Path | None = None, timeout: float = 200.0) -> Ended:
    """Run ``megatron-bert`` with arguments in a folder.

    Args:
        *arguments: of the command.
        folder: to run in.
        stdout: a file that takes the standard output.
        timeout: see below.

    Raises:
        TimeoutError: it took longer than ``timeout`` seconds, and was killed.
    """
    return _ended(_command, arguments, folder, stdout, timeout)


def run_python(*arguments: str, folder: Path, timeout: float = 200.0) -> Ended:
    """Run ``python`` with the arguments ``-m MODULE ...`` or ``FILE ...`` in a folder; see :func:`run_command`."""
    return _ended(_python, arguments, folder, None, timeout)


def _ended(program: _Program, arguments: tuple[str, ...], folder: Path, stdout: Path | None, timeout: float) -> Ended:
    with tempfile.NamedTemporaryFile(mode="r", prefix="command-", encoding="utf-8") as output:
        given = program, arguments, str(folder), output.name, None if stdout is None else str(stdout)
        process = forkserver_context().Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{' '.join(arguments)} took longer than {timeout} seconds:\n{output.read()}")
        return Ended(process.exitcode, output.read())


def run_ranks(
    size: int,
    *arguments: str,
    folder: Path,
    before: Callable[..., Any] | None = None,
    timeout: float = 200.0,
    launched: bool = True,
    python: bool = False,
    **variables: str,
) -> list[Ended]:
    """Run ``megatron-bert``, or a program, as the ranks of one run.

    Args:
        size: number of ranks.
        *arguments: of the command.
        folder: to run in.
        before: called with nothing in each process before the command, and pickled for that.
        timeout: seconds after which all are killed.
        launched: whether all are killed when the first fails, as a launcher does.
        python: the arguments are those of ``python``; see :func:`run_python`.
        **variables: of the environment, beside a launcher's.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(size)}
    processes = []
    outputs = [folder / f"output_{rank}" for rank in range(size)]
    for rank, output in enumerate(outputs):
        output.write_text("")
        environment = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables
        process = forkserver_context().Process(
            target=_run,
            args=(_python if python else _command, arguments, str(folder), str(output), None, environment, before),
        )
        process.start()
        processes.append(process)
    while running := [process for process in processes if process.exitcode is None]:
        ended = connection.wait([process.sentinel for process in running], timeout)
        if not ended or (launched and any(process.exitcode for process in processes)):
            for process in running:
                process.kill()
    return [Ended(process.exitcode, output.read_text()) for process, output in zip(processes, outputs, strict=True)]


def _run(
    program: _Program,
    arguments: tuple[str, ...],
    folder: str,
    output: str,
    stdout: str | None,
    environment: dict[str, str] | None = None,
    before: Callable[..., Any] | None = None,
) -> None:
    prepare_process()
    os.environ.update(environment or {})
    if before is not None:
        before()
    leave_out_pictures()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    os.dup2(file if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
    program(arguments)


def _command(arguments: tuple[str, ...]) -> None:
    sys.argv = ["megatron-bert", *arguments]
    sys.exit(main())


def _python(arguments: tuple[str, ...]) -> None:
    module = arguments[0] == "-m"
    sys.argv = list(arguments[module:])
    sys.path.insert(0, os.getcwd() if module else str(Path(sys.argv[0]).resolve().parent))
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
