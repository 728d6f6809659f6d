# SPDX-License-Identifier: Apache-2.0
"""What one cluster needs of every job: partition, account, modules, container, environment, network. One YAML file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from megatron_bert.config_file import load_sections
from megatron_bert.section import Section

#: Names the site's file, for whoever does not want to give --site each time.
SITE_VARIABLE = "MEGATRON_BERT_SITE"


class ContainerSettings(Section):
    """An image that the run starts in, on every node."""

    image: str = Field(description="Image: a path, or what the runtime takes for one.")
    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="pyxis (options of srun, with enroot) or apptainer (a command in front)."
    )
    mounts: list[str] = Field(
        default_factory=list, description="SOURCE:TARGET of directories to mount; must hold the data and the run."
    )


class SiteSettings(Section):
    """A cluster. Everything has a default; most sites need a partition and an account."""

    partition: str | None = Field(None, description="Partition (queue); --partition overrides it.")
    account: str | None = Field(None, description="Account that is charged; --account overrides it.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features that nodes must have.")
    gpu_type: str | None = Field(None, description="Type of GPU, where the cluster has several, such as h100.")
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="How GPUs are asked for; none where nodes come whole."
    )
    cpus_per_gpu: int | None = Field(
        None, gt=0, description="Cores per GPU; whole nodes (--exclusive) are asked for when unset."
    )
    memory: str | None = Field(None, description="Memory a node, as --mem takes it; 0 is all of it.")
    options: list[str] = Field(
        default_factory=list, description="More options of sbatch, such as --mail-type=FAIL, one per line."
    )
    srun_options: list[str] = Field(default_factory=list, description="More options of srun, such as --mpi=none.")
    modules: list[str] = Field(default_factory=list, description="Modules to load, in this order.")
    setup: list[str] = Field(
        default_factory=list, description="Lines of bash before the start, such as: source .venv/bin/activate"
    )
    python: str = Field("python", description="The interpreter that megatron-bert is installed for.")
    container: ContainerSettings | None = Field(None, description="Image to start in; none when unset.")
    environment: dict[str, str] = Field(default_factory=dict, description="Environment variables of the run.")
    network_interface: str | None = Field(
        None, description="Interface that nodes talk over (NCCL's and gloo's), such as ib0; theirs to find when unset."
    )
    stop_seconds: int = Field(
        300, gt=0, description="How long before the time limit the run is asked to save and stop, in seconds."
    )
    max_restarts: int = Field(
        3, ge=0, description="How often a run whose processes fail is started again within a job."
    )

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"{name!r} is not a name of an environment variable")
        return value


def load_site(path: Path | None) -> SiteSettings:
    """The site's settings from a file, from the one that :data:`SITE_VARIABLE` names, or the defaults.

    Raises:
        UserError: the file cannot be read or holds a setting that is none.
    """
    if path is None and SITE_VARIABLE in os.environ:
        path = Path(os.environ[SITE_VARIABLE])
    return SiteSettings() if path is None else load_sections(path, [], SiteSettings, as_written=True)
