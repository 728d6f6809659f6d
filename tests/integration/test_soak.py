# SPDX-License-Identifier: Apache-2.0
"""A short soak in each way of starting a run; `python -m tests.integration.soak` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import hosts, slurm_cluster
from tests.integration.cluster_support import need, once, shared_folder
from tests.integration.soak import WAYS, run_undisturbed, soak

KILLS = 1
PROGRAMS = {"torchrun": (), "node": (), "hosts": hosts.PROGRAMS, "slurm": slurm_cluster.PROGRAMS}
#: Loader processes, which start slowly, end in the same way on one host and on several.
LOADERS = {"torchrun": 1, "node": 0, "hosts": 0, "slurm": 1}
#: With these, every signal is sent once, to either rank; that on a node during a start, the others after a checkpoint.
SEEDS = {"torchrun": 90, "node": 52, "hosts": 86, "slurm": 195}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """The run that nobody disturbed; whichever worker comes first makes it."""
    return once(shared_folder(tmp_path_factory) / f"soak-{testrun_uid}", lambda folder: run_undisturbed(folder, KILLS))


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("way", WAYS)
def test_killed_ranks_change_nothing_and_leave_nothing(tmp_path: Path, whole: Path, way: str) -> None:
    if PROGRAMS[way]:
        need(PROGRAMS[way], "iproute2 procps slurmctld slurmd slurm-client munge")
    found = soak(way, KILLS, tmp_path / way, whole, SEEDS[way], LOADERS[way])
    assert sum(found[name] for name in found if name.startswith("SIG")) == KILLS
    assert found["starts"] > 1
