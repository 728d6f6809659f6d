# SPDX-License-Identifier: Apache-2.0
"""Submitting a corpus to Slurm: an array of jobs that make a part each, and one that merges them when all are done."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

from megatron_bert.data.commands import add_preprocess_options
from megatron_bert.data.inputs import InputRows, Part
from megatron_bert.data.merging import part_prefix
from megatron_bert.data.preprocess import checked_splitter, corpus_prefix
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.launching.job import TASK, check_words
from megatron_bert.launching.script import (
    bash_array,
    batch_script,
    container_words,
    job_name,
    name_pattern,
    of_site,
    option_lines,
    quoted,
    surroundings,
)
from megatron_bert.launching.site import SiteSettings, load_site
from megatron_bert.launching.submit import check_slurm, queue
from parallel.errors import UserError

#: Options of submit that preprocessing has no use for.
_UNUSED = ("nodes", "gpus_per_node", "min_nodes", "style", "array")

#: Parts of a corpus: their names are the arguments of one command.
MOST_PARTS = 10_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"Options of preprocess: {message}; give them after --, see megatron-bert preprocess --help.")


def run_submit_parts(arguments: argparse.Namespace) -> None:
    """Run `submit --command preprocess`.

    Raises:
        UserError: the request does not fit, inputs are missing, or Slurm refuses it.
    """
    words = [arguments.config, *arguments.overrides]
    options = _check(arguments, words)
    site = load_site(arguments.site)
    prefix = corpus_prefix(options.output_prefix, options.json_key, split_sentences=not options.keep_documents)
    parts = _parts_script(arguments, site, words, prefix)
    if arguments.dry_run:
        print(f"{parts}\n{_merge_script(arguments, site, prefix, 'PARTS')}", end="")
        return
    check_slurm()
    logs = Path(_logs(prefix))
    number = queue(parts, [logs])
    merging = queue(_merge_script(arguments, site, prefix, number))
    print(
        f"job {number}: preprocess in {arguments.parts} parts; job {merging} merges them into {prefix}\n"
        f"  state:   squeue --job {number},{merging}\n"
        f"  output:  tail -F {logs}/slurm-{number}_*.out\n"
        f"  a part that failed: make it again with the same options and --part K/{arguments.parts}, then\n"
        f"           megatron-bert merge {part_prefix(prefix, Part(1, arguments.parts))[: -len('00001-of-00000')]}"
        f"*-of-{arguments.parts:05}.idx --output {prefix}"
    )


def _check(arguments: argparse.Namespace, words: list[str]) -> argparse.Namespace:
    """The options of preprocess, checked as far as that needs no reading of the text."""
    for name in _UNUSED:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --command preprocess: leave it out.")
    for name, given in (("parts", arguments.parts), ("cpus-per-part", arguments.cpus_per_part)):
        if given is None and name == "parts":
            raise UserError("--parts is missing: say in how many parts the corpus is made.")
        if given is not None and given < 1:
            raise UserError(f"--{name} is {given}: give 1 or more.")
    if arguments.parts > MOST_PARTS:
        raise UserError(f"--parts is {arguments.parts}: give at most {MOST_PARTS:,}, whose names one command takes.")
    check_words((*words, arguments.name or ""), arguments.time, arguments.dependency)
    for text in (*words, arguments.name or ""):
        if TASK in text:
            raise UserError(f"{text!r} holds {TASK}, which stands for the number of a job: name it otherwise.")
    parser = _Parser(prog="preprocess", add_help=False)
    add_preprocess_options(parser)
    options = parser.parse_args(words)
    if options.part is not None:
        raise UserError("--part is what each job of the array gets: leave it out.")
    workers = 1 if options.workers is None else options.workers
    checked_splitter(workers, not options.keep_documents, options.language, options.sentence_splitter)
    InputRows(options.input, options.json_key, Part(1, arguments.parts))
    load_tokenizer(options.tokenizer)
    return options


def _logs(prefix: str) -> str:
    return f"{prefix}.logs"


def _script(
    arguments: argparse.Namespace,
    site: SiteSettings,
    prefix: str,
    own: Mapping[str, str | None],
    comment: str,
    command: list[str],
) -> str:
    options = {
        "job-name": arguments.name or job_name(prefix),
        "nodes": "1",
        "ntasks": "1",
        **of_site(site, arguments.partition, arguments.account),
        "time": arguments.time,
        **own,
        "requeue": "",
        "open-mode": "append",
    }
    container, srun_options = container_words(site.container)
    words = [
        bash_array("CONTAINER", [*container, site.python]),
        bash_array("SRUN_OPTIONS", [*site.srun_options, *srun_options]),
        *command,
    ]
    before = [*surroundings(site), "set -euo pipefail"]
    return batch_script(comment, option_lines(options) + site.options, before, words)


#: A step of the job. Slurm hands the cores of a job to its steps only where it is asked to.
_RUN = (
    'exec srun --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} '
    '${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "${CONTAINER[@]}" -m megatron_bert'
)


def _parts_script(arguments: argparse.Namespace, site: SiteSettings, words: list[str], prefix: str) -> str:
    whole_nodes = arguments.cpus_per_part is None
    own = {
        "array": f"1-{arguments.parts}",
        "cpus-per-task": None if whole_nodes else str(arguments.cpus_per_part),
        "exclusive": "" if whole_nodes else None,
        "mem": site.memory if whole_nodes else None,
        "dependency": arguments.dependency,
        "output": f"{name_pattern(_logs(prefix), False)}/slurm-%A_%a.out",
    }
    comment = f"preprocess in {arguments.parts} parts: {shlex.join(words)}"
    part = f'--part "$SLURM_ARRAY_TASK_ID/{arguments.parts}"'
    command = [bash_array("OPTIONS", words), f'{_RUN} preprocess "${{OPTIONS[@]}}" {part}']
    return _script(arguments, site, prefix, own, comment, command)


def _merge_script(arguments: argparse.Namespace, site: SiteSettings, prefix: str, parts: str) -> str:
    output = f"{name_pattern(_logs(prefix), False)}/slurm-%j.out"
    own = {"cpus-per-task": "1", "dependency": f"afterok:{parts}", "output": output}
    names = [part_prefix(prefix, Part(number, arguments.parts)) for number in range(1, arguments.parts + 1)]
    command = [bash_array("PARTS", names), f'{_RUN} merge "${{PARTS[@]}}" --output {quoted(prefix)}']
    return _script(arguments, site, prefix, own, f"merge of {prefix}", command)
