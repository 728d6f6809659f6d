# SPDX-License-Identifier: Apache-2.0
"""All checks in turn, and the report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_bert.launching.doctor.findings import Finding, failed, ok
from megatron_bert.launching.doctor.machine import compare, this_machine
from megatron_bert.launching.doctor.network import (
    all_reduce_bandwidth,
    clock_offsets,
    judge_clocks,
    judge_links,
    pair_bandwidths,
)
from megatron_bert.launching.doctor.storage import check_storage
from parallel.errors import called, first_of
from parallel.object_collectives import gather_objects
from parallel.process_group import World, process_group

#: A rank that does not come within this many seconds ends the examination.
_TIMEOUT = 45.0


def run_doctor(arguments: argparse.Namespace) -> int:
    """Examine the machines; 0 if a run will work, 1 if something must be fixed first.

    Raises:
        UserError: the device cannot be had, or a launcher's variable is missing.
    """
    began = time.monotonic()
    with called(device="--device"), process_group(arguments.device, _TIMEOUT) as world:
        findings = examine(world, arguments.dir, arguments.megabytes)
    if world.is_first:
        for finding in findings:
            print(finding)
        count = sum(finding.grade != "ok" for finding in findings)
        print(
            f"{len(findings)} checks of {world.size} processes in {time.monotonic() - began:.0f} s, {count} to look at"
        )
    # Every rank but the first ends well: launchers take anything else for a failure of that rank.
    return int(world.is_first and any(finding.grade == "failed" for finding in findings))


def examine(world: World, directory: Path, megabytes: int) -> list[Finding]:
    """Every check, the same result on every rank; every rank calls.

    Args:
        directory: where runs are to write.
        megabytes: size of the tensors that are sent.
    """
    known = gather_objects(this_machine(world.device))
    hosts = list(dict.fromkeys(machine.host for machine in known))
    leaders = [next(rank for rank, machine in enumerate(known) if machine.host == host) for host in hosts]
    findings = [
        ok("processes", f"{world.size} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}: {first_of(hosts, 8)}")
    ]
    findings += compare(known)
    if world.size > 1:
        backend = "NCCL" if world.device.type == "cuda" else "gloo"
        speed = all_reduce_bandwidth(world.device, megabytes)
        text = f"{backend} over all ranks: {speed:.2f} GB/s bus bandwidth with {megabytes} MiB"
        findings.append(ok("all-reduce", text) if speed > 0 else failed("all-reduce", text))
    if len(hosts) > 1:
        findings += judge_links(hosts, pair_bandwidths(leaders, world.device, megabytes))
        findings += judge_clocks(hosts, clock_offsets(leaders))
    findings += check_storage(directory)
    return findings
