# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert convert` and `megatron-bert inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_bert.arguments import given_path
from megatron_bert.convert.options import ReadOptions, WriteOptions
from parallel.errors import UserError

# Written out, so that the command line starts without importing torch; a test compares them with the table.
FORMAT_NAMES = ("native", "huggingface", "megatron-core", "megatron")


def add_convert_commands(commands: Any) -> None:
    """Add the subcommands.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned; each command sets ``func``.
    """
    convert = commands.add_parser("convert", help="convert a checkpoint from any format to another")
    convert.add_argument("source", type=given_path, metavar="SRC", help="a checkpoint file, its folder, or a zip file")
    convert.add_argument(
        "destination", type=given_path, metavar="DST", help="folder to write, or .zip for Megatron's formats"
    )
    convert.add_argument("--to", metavar="FORMAT", required=True, help=", ".join(FORMAT_NAMES))
    add_read_options(convert)
    add_write_options(convert)
    convert.set_defaults(func=run_convert)

    inspect = commands.add_parser("inspect", help="say what a checkpoint is, or which checkpoints a run has")
    inspect.add_argument(
        "source", type=given_path, metavar="SRC", help="a checkpoint file, its folder, a zip file, or a run directory"
    )
    inspect.add_argument(
        "--verify", action="store_true", help="read checkpoints of a run whole, and compare them with their checksums"
    )
    add_read_options(inspect)
    inspect.set_defaults(func=run_inspect)


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Options for what a source does not say."""
    ReadOptions.add_to(parser.add_argument_group("what the source does not say"))


def add_write_options(parser: argparse.ArgumentParser) -> None:
    """Options for how to write."""
    group = parser.add_argument_group("how to write")
    WriteOptions.add_to(group)
    group.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is there; other files stay"
    )
    group.add_argument("--dry-run", action="store_true", help="open and check everything, write nothing")
    group.add_argument(
        "--verify",
        type=given_path,
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="predict masked words of English sentences, or of the lines of FILE, and report the loss",
    )


def run_convert(arguments: argparse.Namespace) -> None:
    """Convert, and print what was done."""
    convert_as_told(arguments, arguments.destination, to=arguments.to, beside=False)


def convert_as_told(arguments: argparse.Namespace, destination: Path, *, to: str, beside: bool) -> None:
    """Convert with the options of :func:`add_read_options` and :func:`add_write_options`, and print what was done.

    Raises:
        UserError: see :func:`megatron_bert.convert.conversion.convert`.
    """
    from megatron_bert.convert.conversion import convert

    report = convert(
        arguments.source,
        destination,
        to=to,
        read=ReadOptions.given(arguments),
        write=WriteOptions.given(arguments),
        dry_run=arguments.dry_run,
        overwrite=arguments.overwrite,
        beside=beside,
        verify_text=arguments.verify,
    )
    print(report)


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint is, of a run directory all of them.

    Raises:
        UserError: it is none; or of those of a run, one that was not set aside is damaged, or none is whole.
    """
    from megatron_bert.convert.inspection import inspect
    from megatron_bert.convert.run_checkpoints import as_table, list_checkpoints

    found = list_checkpoints(arguments.source, verify=arguments.verify)
    if not found:
        if arguments.verify:
            raise UserError(
                f"{arguments.source} holds no checkpoint of a run, so it has no checksums: leave out --verify"
            )
        print(inspect(arguments.source, ReadOptions.given(arguments)))
        return
    print(as_table(found))
    whole = [row for row in found if row.fault is None and not row.set_aside]
    if whole:
        try:
            print(f"\n{inspect(whole[-1].path, ReadOptions.given(arguments))}")
        except UserError as error:
            print(f"note: {error}")  # whole, but no model that is known
    damaged = [row for row in found if row.fault is not None and not row.set_aside]
    if damaged and found[0].path == arguments.source:
        raise UserError(f"{arguments.source} cannot be read ({damaged[0].fault}): use another checkpoint")
    if damaged or not whole:
        names = ", ".join(f"{row.path.name} ({row.fault})" for row in damaged)
        said = f"of the checkpoints in {arguments.source}, {names or 'all'} cannot be read"
        if whole:
            raise UserError(f"{said}: a run that resumes goes on from {whole[-1].path.name}, and sets later ones aside")
        raise UserError(f"{said}: none is whole, so bring one back from a copy")
