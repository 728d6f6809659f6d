# SPDX-License-Identifier: Apache-2.0
"""The subcommands of planning, whose work is loaded when one runs."""

from __future__ import annotations

import argparse

from megatron_bert.arguments import given_path
from parallel.errors import UserError

#: Devices whose published numbers are known; see :mod:`megatron_bert.planning.devices`.
DEVICE_NAMES = ("b200", "h200", "h100", "a100", "l40s", "v100", "cpu")

_DESCRIPTION = """\
Compare every way to lay a run out over a number of devices: memory, messages, step time, and what the run takes.
Settings of pretrain, finetune and quantize. Nothing is started, and no device is needed."""


def add_plan_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line's parser."""
    parser = subparsers.add_parser("plan", help="find the fastest layout of a run", description=_DESCRIPTION)
    parser.add_argument("config", type=given_path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="devices, each with a rank")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME|FILE",
        help=f"{', '.join(DEVICE_NAMES)}, or a file of `megatron-bert bench`",
    )
    parser.add_argument(
        "--network", type=given_path, metavar="FILE", help="link between nodes (default: 400 Gbit/s a GPU)"
    )
    parser.add_argument(
        "--encoder",
        type=given_path,
        metavar="CONFIG.yaml",
        help="of a task: settings of pretrain that say the sizes of a model.from which is not there yet",
    )
    parser.add_argument("--disk", type=float, default=2.0, metavar="GB/S", help="file system, for checkpoints")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts shown")
    parser.add_argument("--explain", action="store_true", help="say why the other layouts are out")
    parser.add_argument("--write", type=given_path, metavar="FILE", help="write the settings of the fastest layout")
    parser.add_argument("--png", type=given_path, metavar="FILE", help="draw memory, a step, and throughput")
    parser.set_defaults(func=_plan)


def add_bench_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure this machine for `plan`",
        description="Measure matrix products, attention, memory, the optimizer and the link between ranks of this "
        "machine, and write them as a file that `megatron-bert plan --gpu` and `--network` read.",
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes that measure at once (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=given_path, metavar="FILE", help="file to write")
    parser.set_defaults(func=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from megatron_bert.planning.bench import run_bench

    run_bench(arguments)


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_bert.planning.plan_command import run_plan

    run_plan(arguments)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Let a command that starts a run check it instead."""
    parser.add_argument(
        "--dry-run", action="store_true", help="check the run, measure a step of some ranks, and start nothing"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="dry run: processes (default: those that are started)")
    parser.add_argument(
        "--rank",
        type=int,
        action="append",
        metavar="R",
        help="dry run: which ranks (default: the fullest, and those at the ends of the pipeline)",
    )
    parser.add_argument(
        "--gpu", metavar="NAME|FILE", help="dry run: refuse a rank that does not fit; as `megatron-bert plan`"
    )


def check_dry_run(arguments: argparse.Namespace) -> bool:
    """Whether a run is only to be checked.

    Raises:
        UserError: options of a dry run without one.
    """
    given = [name for name in ("gpus", "rank", "gpu") if getattr(arguments, name) is not None]
    if given and not arguments.dry_run:
        raise UserError(f"--{given[0]} is an option of --dry-run: add that, or leave it out")
    return bool(arguments.dry_run)
