# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of a layout sit: tensor groups belong inside a host, pipelines across hosts."""

from __future__ import annotations

from itertools import groupby

from parallel.hosts import host_name
from parallel.mesh import ParallelLayout
from parallel.object_collectives import gather_objects


def gather_hosts() -> list[str]:
    """The host of every rank of the world; every rank calls."""
    return gather_objects(host_name())


def host_order_warnings(layout: ParallelLayout, hosts: list[str]) -> list[str]:
    """What is wrong with the order of the ranks, in sentences; nothing for a run on one host.

    Tensor groups are neighbors in rank and talk several times per layer; the stages of a pipeline are farthest apart
    and talk least. That is right when every host has consecutive ranks, as many as tensor groups fill.

    Args:
        hosts: by rank.
    """
    if len(set(hosts)) == 1:
        return []
    blocks = [host for host, _ in groupby(hosts)]
    scattered = len(blocks) > len(set(hosts))
    groups = [range(first, first + layout.tensor) for first in range(0, len(hosts), layout.tensor)]
    apart = [group for group in groups if len({hosts[rank] for rank in group}) > 1]
    order = "start them host by host, as torchrun does, or srun with --distribution=block"
    if apart:
        first = apart[0]
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in first))
        return [
            f"{len(apart)} of {len(groups)} tensor groups reach over the network, ranks {first[0]} to {first[-1]} over "
            f"hosts {where}: "
            + (order if scattered else "choose a tensor-parallel size that divides the number of processes on a host")
        ]
    if scattered and layout.pipeline > 1:
        return [
            f"the ranks are not in the order of their hosts ({', '.join(blocks[:4])}, ...), so data-parallel groups "
            f"reach over the network where stages of the pipeline should: {order}"
        ]
    return []
