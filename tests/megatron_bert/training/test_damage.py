# SPDX-License-Identifier: Apache-2.0
"""A run whose checkpoint is damaged goes on from the one before, says what is wrong, and loses nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import STATE_FILE
from parallel.errors import DamagedCheckpointError, UserError
from parallel.manifest import MANIFEST_FILE
from tests.integration.slurm_cluster import free_ports
from tests.integration.slurm_runs import undisturbed
from tests.megatron_bert.training.faults import Damage, cut, flip, lose, state, without_checksums
from tests.megatron_bert.training.runs import STEPS, assert_same_checkpoint, rows, run_settings
from tests.worlds import run_world


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    pretrain(run_settings(data, run, checkpoint__every=2))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same run, stopped after step 4, with checkpoints of steps 2 and 4."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    return copy


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip("*.distcp", 2000), "distcp has changed since it was written"),
        (flip("*.distcp", -300), "distcp has changed since it was written"),
        (flip(".metadata", 100), "metadata has changed since it was written"),
        (flip(STATE_FILE, 10), "state.json has changed since it was written"),
        (flip(MANIFEST_FILE, 1), "manifest.json is damaged"),
        (cut("*.distcp"), "bytes instead of"),
        (cut(STATE_FILE), "bytes instead of"),
        (cut(MANIFEST_FILE), "manifest.json is damaged"),
        (lose("*.distcp"), "distcp is missing"),
        (lose(".metadata"), ".metadata is missing"),
        (lose(STATE_FILE), "state.json is missing"),
        (lose(MANIFEST_FILE), "manifest.json is missing"),
        (without_checksums(cut(STATE_FILE)), "state.json is damaged"),
        (without_checksums(cut(".metadata")), ".metadata is damaged"),
        (without_checksums(cut("*.distcp")), "is damaged"),
        (without_checksums(state(step="4")), "step in state.json is 4"),
        (without_checksums(state(consumed_samples=True)), "consumed_samples in state.json is True"),
        (without_checksums(state(optimizer=[])), "optimizer in state.json is []"),
    ],
)
def test_the_one_before_is_taken(
    data: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture[str], damage: Damage, fault: str
) -> None:
    damage(run / "checkpoints" / "step_00000004")
    kept = {path.name: path.read_bytes() for path in (run / "checkpoints" / "step_00000004").iterdir()}
    pretrain(run_settings(data, run, checkpoint__every=2))
    notes = [line for line in capsys.readouterr().out.splitlines() if "damaged: steps" in line]
    assert len(notes) == 1
    assert fault in notes[0]
    assert notes[0].startswith("note: checkpoint step_00000004 cannot be read (")
    assert notes[0].endswith(" is kept as step_00000004.damaged: steps 3 to 4 are trained again")
    assert rows(run) == rows(whole)
    for step in (4, STEPS):
        name = f"checkpoints/step_{step:08d}"
        assert_same_checkpoint(run / name, whole / name)
    aside = run / "checkpoints" / "step_00000004.damaged"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == kept


def test_without_a_whole_one_nothing_begins_from_scratch(data: Path, run: Path) -> None:
    for step in (2, 4):
        flip("*.distcp", 2000)(run / "checkpoints" / f"step_{step:08d}")
    settings = run_settings(data, run, checkpoint__every=2)
    for _ in range(2):  # also once both are set aside
        with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints is whole .*: bring one back from a copy"):
            pretrain(settings)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000002.damaged", "step_00000004.damaged"]


def test_one_that_is_named_is_refused(data: Path, run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000004"
    flip("*.distcp", 2000)(checkpoint)
    settings = run_settings(data, run.with_name("other"), checkpoint__resume=str(checkpoint))
    with pytest.raises(DamagedCheckpointError, match=r"4 cannot be read .* has changed .*: use another one"):
        pretrain(settings)
    assert checkpoint.is_dir()
    assert not list(run.with_name("other").glob("checkpoints")), "a refused start leaves nothing behind"


def test_a_shard_that_one_rank_reads(data: Path, tmp_path: Path) -> None:
    """What one rank finds sends all of them back."""
    run = tmp_path / "run"
    settings = run_settings(data, run, checkpoint__every=2, parallel__tensor=2, parallel__data=None)
    run_world(2, undisturbed, settings, free_ports(1)[0])
    expected = rows(run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    flip("__1_0.distcp", 2000)(run / "checkpoints" / "step_00000004")
    run_world(2, undisturbed, settings, free_ports(1)[0])
    assert rows(run) == expected
    assert (run / "checkpoints" / "step_00000004.damaged").is_dir()
