# SPDX-License-Identifier: Apache-2.0
"""Submitting a corpus to Slurm: an array of jobs that make a part each, and one that merges them when all are done."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megatron_bert.data.commands import add_preprocess_options
from megatron_bert.data.inputs import InputRows, Part
from megatron_bert.data.merging import part_prefix
from megatron_bert.data.preprocess import checked_splitter, corpus_prefix
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.launching.job import TASK, check_dependency, seconds_of
from megatron_bert.launching.script import (
    bash_array,
    container_words,
    job_name,
    name_pattern,
    option_line,
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
    for text in (*words, arguments.name or ""):
        if not text.isprintable():
            raise UserError(f"{text!r} holds a line break or another control character: a batch script cannot hold it.")
        if TASK in text:
            raise UserError(f"{text!r} holds {TASK}, which stands for the number of a job: name it otherwise.")
    seconds_of(arguments.time)
    if arguments.dependency is not None:
        check_dependency(arguments.dependency)
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


def _options(arguments: argparse.Namespace, site: SiteSettings, prefix: str, **own: str | None) -> list[str]:
    named = {
        "job-name": arguments.name or job_name(prefix),
        "nodes": "1",
        "ntasks": "1",
        "partition": arguments.partition or site.partition,
        "account": arguments.account or site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "time": arguments.time,
        **own,
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return [option_line(option) for option in [*options, "--requeue", "--open-mode=append"]] + site.options


def _script(options: list[str], site: SiteSettings, comment: str, command: list[str]) -> str:
    container, srun_options = container_words(site.container)
    sections = [
        f"#!/usr/bin/env bash\n# {comment}",
        "\n".join(f"#SBATCH {option}" for option in options),
        "\n".join([*surroundings(site), "set -euo pipefail"]),
        "\n".join(
            [
                bash_array("CONTAINER", [*container, site.python]),
                bash_array("SRUN_OPTIONS", [*site.srun_options, *srun_options]),
                *command,
            ]
        ),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


#: A step of the job. Slurm hands the cores of a job to its steps only where it is asked to.
_RUN = (
    'exec srun --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} '
    '${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "${CONTAINER[@]}" -m megatron_bert'
)


def _parts_script(arguments: argparse.Namespace, site: SiteSettings, words: list[str], prefix: str) -> str:
    whole_nodes = arguments.cpus_per_part is None
    options = _options(
        arguments,
        site,
        prefix,
        **{
            "array": f"1-{arguments.parts}",
            "cpus-per-task": None if whole_nodes else str(arguments.cpus_per_part),
            "dependency": arguments.dependency,
            "output": f"{name_pattern(_logs(prefix), False)}/slurm-%A_%a.out",
        },
    )
    if whole_nodes:
        options += ["--exclusive"] if site.memory is None else ["--exclusive", option_line(f"--mem={site.memory}")]
    comment = f"preprocess in {arguments.parts} parts: " + " ".join(shlex.quote(word) for word in words)
    part = f'--part "$SLURM_ARRAY_TASK_ID/{arguments.parts}"'
    return _script(
        options, site, comment, [bash_array("OPTIONS", words), f'{_RUN} preprocess "${{OPTIONS[@]}}" {part}']
    )


def _merge_script(arguments: argparse.Namespace, site: SiteSettings, prefix: str, parts: str) -> str:
    output = f"{name_pattern(_logs(prefix), False)}/slurm-%j.out"
    own = {"cpus-per-task": "1", "dependency": f"afterok:{parts}", "output": output}
    options = _options(arguments, site, prefix, **own)
    names = [part_prefix(prefix, Part(number, arguments.parts)) for number in range(1, arguments.parts + 1)]
    command = f'{_RUN} merge "${{PARTS[@]}}" --output {quoted(prefix)}'
    return _script(options, site, f"merge of {prefix}", [bash_array("PARTS", names), command])
