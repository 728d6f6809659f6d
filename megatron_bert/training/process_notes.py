# SPDX-License-Identifier: Apache-2.0
"""What a run says of the processes it got: where they sit, and whether there are fewer than before."""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint import read_state
from parallel.host_order import gather_hosts, host_order_warnings
from parallel.mesh import ParallelLayout
from parallel.process_group import launched_world_size


def process_notes(layout: ParallelLayout, resume_from: Path | None) -> list[str]:
    """Sentences for the user; every rank calls.

    Args:
        layout: of the run.
        resume_from: the checkpoint it goes on from, if any.
    """
    notes = host_order_warnings(layout, gather_hosts())
    before = read_state(resume_from).get("data_size") if resume_from is not None else None
    if before is not None and before != layout.data:
        way = "fewer" if layout.data < before else "more"
        notes.append(
            f"elastic: {way} processes than before, data-parallel size {before} -> {layout.data}; the batch is the same"
        )
    spares = launched_world_size() - layout.world_size
    if spares > 0:
        notes.append(f"elastic: {spares} of {launched_world_size()} processes have no place in the layout and wait")
    return notes
