# SPDX-License-Identifier: Apache-2.0
"""The subcommands `evaluate` and `predict`."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_bert.arguments import given_path
from parallel.errors import UserError
from parallel.whole_files import reporting, whole_file

if TYPE_CHECKING:
    from megatron_bert.finetuning.inference import Engine


def add_finetuned_commands(commands: Any) -> None:
    """Add the subcommands that use a fine-tuned model."""
    evaluate = commands.add_parser("evaluate", help="score a fine-tuned model on labeled files")
    _add_model(evaluate)
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as data.test=FILE")
    evaluate.add_argument(
        "--output", type=given_path, metavar="DIR", help="write results, predictions, files to submit"
    )
    evaluate.set_defaults(func=_evaluate)

    predict = commands.add_parser("predict", help="answer JSON lines with a fine-tuned model")
    _add_model(predict)
    predict.add_argument("overrides", nargs="*", metavar="task.key=value", help="such as task.max_length=256")
    predict.add_argument("--input", type=given_path, metavar="FILE", help="JSON lines (default: standard input)")
    predict.add_argument("--output", type=given_path, metavar="FILE", help="JSON lines (default: standard output)")
    predict.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="stop at a row that cannot be read, or answer it with its error",
    )
    predict.add_argument(
        "--stream",
        action="store_true",
        help="answer every row by itself, before the next (default: with those that have come by then)",
    )
    predict.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="with --stream: how long a row may wait for others to share its forward pass (default 0)",
    )
    predict.set_defaults(func=_predict)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=given_path, metavar="MODEL", help="a fine-tuning run, or a model directory")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts a forward pass (default 32)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument(
        "--backend",
        choices=("torch", "integer", "reference", "cpu", "cuda"),
        default="torch",
        help="integer: run a quantized model by the fastest integer engine here, or by the one that is named, with the "
        "same answers; cuda, for GPUs, must be named, because it has not run on one yet (default torch)",
    )
    command.add_argument("--threads", type=int, metavar="N", help="of an integer engine (default: its choice)")


def _engine(arguments: argparse.Namespace) -> Engine:
    from megatron_bert.finetuning.inference import Engine

    return Engine(arguments.backend, arguments.threads)


def _checked_batch_size(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}: give 1 or more")
    return arguments.batch_size


def _checked_stream(arguments: argparse.Namespace) -> float | None:
    """Seconds that a row may wait for others; None where rows are answered as they come."""
    if not 0 <= arguments.wait < threading.TIMEOUT_MAX:
        raise UserError(f"--wait is {arguments.wait}: give seconds, 0 or more")
    if arguments.wait and not arguments.stream:
        raise UserError("--wait says how long the rows of --stream wait for others: give --stream too")
    return arguments.wait if arguments.stream else None


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_bert.finetuning.inference import evaluate_files

    evaluate_files(
        arguments.model,
        arguments.overrides,
        output=arguments.output,
        batch_size=_checked_batch_size(arguments),
        device=arguments.device,
        engine=_engine(arguments),
    )


def _predict(arguments: argparse.Namespace) -> int:
    from megatron_bert.finetuning.inference import BadRowError, predict_stream

    batch_size, stream = _checked_batch_size(arguments), _checked_stream(arguments)
    bad, stopped = 0, None
    with _input(arguments.input) as rows, _output(arguments.output) as answers:
        try:
            bad = predict_stream(
                arguments.model,
                rows,
                answers,
                batch_size=batch_size,
                stream=stream,
                on_bad_row=arguments.on_bad_row,
                device=arguments.device,
                engine=_engine(arguments),
                progress=arguments.output is not None and sys.stderr.isatty(),
                overrides=arguments.overrides,
            )
        except BadRowError as row:
            stopped = row  # the answers before it are written whole
    if stopped is not None:
        raise stopped
    if bad:
        print(f"{bad} rows have no answer: what stands in its place holds the error", file=sys.stderr)
    return 0


@contextmanager
def _input(path: Path | None) -> Iterator[IO[str]]:
    """Lines of a file or of standard input; bytes that are not UTF-8 come as lone surrogates."""
    if path is None:
        if sys.stdin is None:
            raise UserError("standard input is closed: give --input FILE, or rows on a pipe")
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
        yield sys.stdin
        return
    with reporting("read", path, "check --input"):
        file = path.open(encoding="utf-8", errors="surrogateescape", newline="\n")
    with file:
        yield file


@contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    """A file that is there once it is whole, or standard output."""
    if path is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    if path.exists() and not path.is_file():
        raise UserError(f"--output is {path}, which is not a regular file: give a file, or leave it out to use a pipe")
    with reporting("written", path, "choose another --output, or make room"), whole_file(path) as file:
        yield file
