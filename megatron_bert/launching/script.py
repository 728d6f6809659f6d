# SPDX-License-Identifier: Apache-2.0
"""The batch script of a job: its options, its values, and what every job does with them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib import resources

from megatron_bert.launching.job import TASK, CheckedJob
from megatron_bert.launching.site import ContainerSettings, SiteSettings

#: What Slurm has in the environment for the number of an array task.
_TASK_VARIABLE = '"$SLURM_ARRAY_TASK_ID"'


def render(job: CheckedJob, site: SiteSettings, command_line: str) -> str:
    """The batch script.

    Args:
        command_line: what the script is made by, for its first comment.
    """
    body = "# ---- from here on the same for every job ----\n" + job_body().rstrip("\n")
    return batch_script(command_line, sbatch_options(job, site), _values(job, site), surroundings(site), [body])


def batch_script(comment: str, options: list[str], *sections: list[str]) -> str:
    """A batch script: a comment, lines of options, and sections of lines, of which empty ones are left out."""
    parts = [[f"#!/usr/bin/env bash\n# {comment}"], [f"#SBATCH {option}" for option in options], *sections]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def job_body() -> str:
    """What every job does with the values that stand above it."""
    text = resources.files("megatron_bert.launching").joinpath("job.sh").read_text(encoding="utf-8")
    return text.removeprefix("# SPDX-License-Identifier: Apache-2.0\n")  # of the source, not of what it makes


def log_directory(job: CheckedJob) -> str:
    """Directory of the logs, with :data:`TASK` where tasks of an array differ."""
    return f"{job.run_dir}/logs"


def sbatch_options(job: CheckedJob, site: SiteSettings) -> list[str]:
    """Options of sbatch, one each."""
    request, counts = job.request, job.node_counts
    tasks = 1 if request.style == "torchrun" else request.gpus_per_node
    cores = None if site.cpus_per_gpu is None else str(site.cpus_per_gpu * request.gpus_per_node // tasks)
    gpus = f"{site.gpu_type}:{request.gpus_per_node}" if site.gpu_type else str(request.gpus_per_node)
    logs = name_pattern(log_directory(job), request.array is not None)
    options = {
        "job-name": request.name or job_name(job.run_dir),
        "nodes": f"{counts[-1]}-{counts[0]}" if len(counts) > 1 else str(counts[0]),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": gpus if site.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if site.gpu_request == "gres" else None,
        "exclusive": "" if cores is None else None,
        "cpus-per-task": cores,
        "mem": site.memory,
        **of_site(site, request.partition, request.account),
        "dependency": request.dependency,
        "array": request.array,
        "time": request.time,
        "signal": f"B:USR1@{site.stop_seconds}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{logs}/slurm-{'%A_%a' if request.array else '%j'}.out",
    }
    return option_lines(options) + site.options


def of_site(site: SiteSettings, partition: str | None, account: str | None) -> dict[str, str | None]:
    """Options of sbatch that a site decides, unless it is asked for other ones."""
    return {
        "partition": partition or site.partition,
        "account": account or site.account,
        "qos": site.qos,
        "constraint": site.constraint,
    }


def option_lines(options: Mapping[str, str | None]) -> list[str]:
    """Options as sbatch reads them from a script, a line each; without those that are None.

    A line is one word, in quotes where white space or a comment would end it.
    """
    words = [f"--{name}={value}" if value else f"--{name}" for name, value in options.items() if value is not None]
    return [
        word if re.fullmatch(r"[^\s\"'\\#]+", word) else '"' + re.sub(r'([\\"])', r"\\\1", word) + '"' for word in words
    ]


def name_pattern(path: str, array: bool) -> str:
    """A path in a file name of sbatch, where a percent sign begins a pattern."""
    return path.replace("%", "%%").replace(f"%{TASK}", TASK if array else f"%{TASK}")


def job_name(run_dir: str) -> str:
    """A name for the job of a run directory."""
    return next((part for part in reversed(run_dir.split("/")) if part and TASK not in part), "megatron-bert")


def _values(job: CheckedJob, site: SiteSettings) -> list[str]:
    request = job.request
    container, srun_options = container_words(site.container)
    after = "0 # the next task of the array goes on" if request.is_chain else "1"
    return [
        f"COMMAND={request.subcommand}",
        f"CONFIG={quoted(str(request.config))}",
        f"RUN_DIR={quoted(job.run_dir)}",
        bash_array("OVERRIDES", job.overrides),
        f"STYLE={request.style}",
        f"NODE_COUNTS=({' '.join(str(count) for count in job.node_counts)})",
        f"GPUS_PER_NODE={request.gpus_per_node}",
        f"MAX_RESTARTS={site.max_restarts}",
        f"REQUEUE={after}",
        f"PYTHON={quoted(site.python)}",
        bash_array("CONTAINER", container),
        bash_array("SRUN_OPTIONS", [*site.srun_options, *srun_options]),
    ]


def surroundings(site: SiteSettings) -> list[str]:
    """Modules, set-up and environment."""
    lines = [f"module load {quoted(name)}" for name in site.modules] + site.setup
    variables = dict(site.environment)
    if site.network_interface is not None:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            variables.setdefault(name, site.network_interface)
    return lines + [f"export {name}={quoted(value)}" for name, value in variables.items()]


def container_words(container: ContainerSettings | None) -> tuple[list[str], list[str]]:
    """What stands before the interpreter, and options of srun."""
    if container is None:
        return [], []
    mounts = ",".join(container.mounts)
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}"]
        return [], options + ([f"--container-mounts={mounts}"] if mounts else [])
    return ["apptainer", "exec", "--nv", *(["--bind", mounts] if mounts else []), container.image], []


def bash_array(name: str, values: list[str]) -> str:
    """An array of bash."""
    return f"{name}=({' '.join(quoted(value) for value in values)})"


def quoted(text: str) -> str:
    """A word of bash; :data:`TASK` becomes the number of the array task."""
    parts = [shlex.quote(part) if part else "" for part in text.split(TASK)]
    return _TASK_VARIABLE.join(parts) if text else "''"
