# SPDX-License-Identifier: Apache-2.0
"""Submitting a run to Slurm: check that it fits, write its batch script, queue it, and say how to watch it."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from megatron_bert.launching.job import TASK, CheckedJob, JobRequest, check_array, check_job
from megatron_bert.launching.script import log_directory, render
from megatron_bert.launching.site import load_site
from parallel.errors import UserError

#: What need not be said.
_DEFAULTS = {"subcommand": "pretrain", "style": "torchrun"}


def run_submit(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
        UserError: the request does not fit, or Slurm refuses it.
    """
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing: say how many")
    for name in ("parts", "cpus_per_part"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --command preprocess, not {arguments.subcommand}")
    arguments.style = arguments.style or "torchrun"
    arguments.config = Path(arguments.config)
    site = load_site(arguments.site)
    request = JobRequest(**{field.name: getattr(arguments, field.name) for field in fields(JobRequest)})
    job = check_job(request, site.stop_seconds)
    for note in job.notes:
        print(note, file=sys.stderr)
    script = render(job, site, command_line(arguments))
    if arguments.dry_run:
        print(script, end="")
        return
    check_slurm()
    if not arguments.unchecked:
        for note in dry_run(job):
            print(note, file=sys.stderr)
    number = submit(job, script)
    print("\n".join(_how_to_watch(job, number)))


def command_line(arguments: argparse.Namespace) -> str:
    """The command that makes the same script."""
    words = ["megatron-bert", "submit", str(arguments.config), *arguments.overrides]
    for name in (*(field.name for field in fields(JobRequest)), "site"):
        value = getattr(arguments, name)
        if name not in ("config", "overrides") and value not in (None, _DEFAULTS.get(name)):
            words += [f"--{'command' if name == 'subcommand' else name.replace('_', '-')}", str(value)]
    return " ".join(shlex.quote(word) for word in words)


def check_slurm() -> None:
    """There must be a Slurm to submit to.

    Raises:
        UserError: there is none.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: run this where jobs are submitted from, or use --dry-run to see the script"
        )


def dry_run(job: CheckedJob) -> list[str]:
    """Run a step of the ranks that take most memory, on no device; what submitting the job should say.

    Corpus and tokenizer of pretraining may be where its nodes are and not here, so nothing is asked of them; the model
    and the data of a task are checked if they are here.

    Raises:
        UserError: a start would refuse the run.
    """
    from megatron_bert.planning.dry_run_command import measure

    overrides = [text.replace(TASK, "0") for text in (*job.overrides, f"training.run_dir={job.run_dir}")]
    return measure(job.request.subcommand, job.request.config, overrides, job.layout.world_size)


def submit(job: CheckedJob, script: str) -> str:
    """Queue the script, and keep a copy in the log directory; returns the job's number.

    Raises:
        UserError: Slurm refuses the job.
    """
    tasks = check_array(job.request.array) if job.request.array else [0]
    folders = [Path(log_directory(job).replace(TASK, str(task))) for task in tasks]
    number = queue(script, folders)
    for folder in folders:
        (folder / f"job-{number}.sbatch").write_text(script, encoding="utf-8")
    return number


def queue(script: str, folders: Sequence[Path] = ()) -> str:
    """Hand a script to Slurm; returns the job's number.

    Args:
        folders: for its output, made first: Slurm would not, and the job would leave none. A refused job leaves no new
            ones behind.

    Raises:
        UserError: Slurm refuses it.
    """
    missing = {each for folder in folders for each in (folder, *folder.parents) if not each.exists()}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode != 0:
        for folder in sorted(missing, reverse=True):  # those inside others first
            with suppress(OSError):  # of what somebody has put there meanwhile
                folder.rmdir()
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def _how_to_watch(job: CheckedJob, number: str) -> list[str]:
    request, folder = job.request, log_directory(job)
    output = f"{folder}/slurm-{f'{number}_{TASK}' if request.array else number}.out"
    layout = job.layout
    nodes = f"{job.node_counts[-1]} to {request.nodes}" if len(job.node_counts) > 1 else f"{request.nodes}"
    return [
        f"job {number}: {request.subcommand} on {nodes} x {request.gpus_per_node} by {request.style}, tensor "
        f"{layout.tensor}, pipeline {layout.pipeline}, data {layout.data}",
        f"  state:            squeue --job {number}",
        f"  output of rank 0: tail -F {output}",
        f"  all ranks:        {folder}/{number}.*/rank_*.log",
        f"  script:           {folder}/job-{number}.sbatch",
        f"  stop for now:     scancel {number}   (saves first; submit again to go on)",
    ]
