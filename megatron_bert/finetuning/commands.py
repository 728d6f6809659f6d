"""The subcommands `evaluate` and `predict`."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TextIO

from parallel.errors import UserError


def add_finetuned_commands(commands: Any) -> None:
    """Add the subcommands that use a fine-tuned model."""
    evaluate = commands.add_parser("evaluate", help="score a fine-tuned model on labelled files")
    _add_model(evaluate)
    evaluate.add_argument("overrides", nargs="*", metavar="data.key=value", help="such as data.test=FILE")
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="write results, predictions, files to submit")
    evaluate.set_defaults(func=_evaluate)

    predict = commands.add_parser("predict", help="answer JSON lines with a fine-tuned model")
    _add_model(predict)
    predict.add_argument("--input", type=Path, metavar="FILE", help="JSON lines (default: standard input)")
    predict.add_argument("--output", type=Path, metavar="FILE", help="JSON lines (default: standard output)")
    predict.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="stop at a row that cannot be read, or answer it with its error",
    )
    predict.set_defaults(func=_predict)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="MODEL", help="a fine-tuning run, or its model directory")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts a forward pass (default 32)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _checked_batch_size(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}: give 1 or more")
    return arguments.batch_size


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_bert.finetuning.inference import evaluate_files

    evaluate_files(
        arguments.model,
        arguments.overrides,
        output=arguments.output,
        batch_size=_checked_batch_size(arguments),
        device=arguments.device,
    )


def _predict(arguments: argparse.Namespace) -> None:
    from megatron_bert.finetuning.inference import predict_stream

    target = arguments.output
    partial = None if target is None else target.with_name(target.name + ".partial")
    try:
        with ExitStack() as stack:
            bad = predict_stream(
                arguments.model,
                _opened(arguments.input, "r", sys.stdin, stack),
                _opened(partial, "w", sys.stdout, stack),
                batch_size=_checked_batch_size(arguments),
                on_bad_row=arguments.on_bad_row,
                device=arguments.device,
                progress=target is not None and sys.stderr.isatty(),
            )
        if partial is not None:
            partial.rename(target)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    if bad:
        print(f"{bad} rows could not be read: their answers hold the error", file=sys.stderr)


def _opened(path: Path | None, mode: str, otherwise: TextIO, stack: ExitStack) -> IO[str]:
    if path is None:
        return otherwise
    try:
        return stack.enter_context(path.open(mode, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None
