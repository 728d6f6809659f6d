# SPDX-License-Identifier: Apache-2.0
"""The subcommands of launching: submit, failures and doctor."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_bert.arguments import given_path
from megatron_bert.launching.launched import launched_process
from megatron_bert.tables import RUNS

_SUBMIT = """\
Check that the settings fit the nodes, write a batch script, and submit it to Slurm. The job saves before its time limit
and is queued again by itself until the run is done; preemption and lost nodes end the same way."""

#: Exit codes of `failures --check-retry` for runs that should not be started again.
_REFUSED, _REPEATED = 3, 4


def _add_submit(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("submit", help="submit a run to Slurm", description=_SUBMIT)
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings; for preprocess its own options, after --")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nodes", type=int, metavar="N", help="needed for all but preprocess")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="processes per node, a GPU each; needed too")
    parser.add_argument("--time", required=True, metavar="T", help="time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    parser.add_argument(
        "--min-nodes", type=int, metavar="N", help="start on fewer nodes, down to N, when no more are free or left"
    )
    parser.add_argument(
        "--command",
        dest="subcommand",
        choices=[*RUNS, "preprocess"],
        default="pretrain",
        help="what to run on the nodes (default: pretrain)",
    )
    parser.add_argument("--parts", type=int, metavar="N", help="preprocess: parts of the corpus, a node each")
    parser.add_argument(
        "--cpus-per-part", type=int, metavar="C", help="preprocess: cores per part (default: whole nodes)"
    )
    parser.add_argument(
        "--style",
        choices=("torchrun", "srun"),
        help="a torchrun on each node, or each process a task of srun (default: torchrun)",
    )
    parser.add_argument("--name", help="of the job (default: the run directory's)")
    parser.add_argument("--partition", help="default: the site's")
    parser.add_argument("--account", help="default: the site's")
    parser.add_argument("--dependency", help="as sbatch takes it, such as afterok:1234 or singleton")
    parser.add_argument(
        "--array",
        metavar="TASKS",
        help="task numbers: 0-9%%1 for ten parts of one run, 0-9 for ten runs with %%a in training.run_dir",
    )
    parser.add_argument("--site", type=given_path, metavar="FILE", help="the cluster (default: $MEGATRON_BERT_SITE)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    parser.add_argument(
        "--unchecked", action="store_true", help="queue without a step of pretraining on simulated devices before"
    )
    parser.set_defaults(func=_submit)


def _submit(arguments: argparse.Namespace) -> None:
    if arguments.subcommand == "preprocess":
        from megatron_bert.launching.corpus_parts import run_submit_parts

        run_submit_parts(arguments)
        return
    from megatron_bert.launching.submit import run_submit

    run_submit(arguments)


def _add_failures(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "failures", help="say which rank of a failed run failed first, and why, from its log directory"
    )
    parser.add_argument("log_dir", type=given_path, metavar="LOG_DIR", help="directory of the rank_*.log files")
    parser.add_argument(
        "--check-retry",
        action="store_true",
        help=f"end with {_REFUSED} if the run was refused, {_REPEATED} if it failed twice in the same way",
    )
    parser.set_defaults(func=_failures)


def _failures(arguments: argparse.Namespace) -> int:
    from megatron_bert.launching.failures import summary, why_final

    print(summary(arguments.log_dir))
    final = why_final(arguments.log_dir) if arguments.check_retry else None
    if final is None:
        return 0
    return _REFUSED if final.refused else _REPEATED


def _add_doctor(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check machines before a run: versions, GPUs, network, shared files, clocks",
        description="Check the machines that a run is to start on, in under a minute: alone, or as a run is started, "
        "with torchrun or srun, on all of them. Ends with 1 if something would keep a run from working.",
    )
    parser.add_argument(
        "--dir",
        type=given_path,
        default=Path("runs"),
        help="directory that runs write to, seen by all hosts (default: runs)",
    )
    parser.add_argument(
        "--megabytes",
        type=int,
        default=64,
        metavar="N",
        help="size of what is sent to measure the network (default: 64)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(func=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_bert.launching.doctor.examination import run_doctor

    with launched_process():
        return run_doctor(arguments)


def add_launch_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommands to the command line's parser."""
    _add_submit(subparsers)
    _add_failures(subparsers)
    _add_doctor(subparsers)
