# SPDX-License-Identifier: Apache-2.0
"""`inspect` of a run directory lists its checkpoints, and says which are whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_bert.cli import main
from megatron_bert.convert.run_checkpoints import RUN_FILES, RUN_FOLDERS, list_checkpoints
from megatron_bert.convert.run_models import MODEL_FOLDER
from megatron_bert.data.tokenizers import RUN_FOLDER
from megatron_bert.training.divergence import BATCHES_FOLDER
from megatron_bert.training.heartbeat import HEARTBEAT_FILE
from megatron_bert.training.metrics_file import METRICS_FILE
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.profiling import FOLDER as PROFILE_FOLDER
from megatron_bert.training.run_lock import LOCK_FILE
from parallel.manifest import MANIFEST_FILE
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_data(folder)
    pretrain(run_settings(folder, folder / "run", checkpoint__every=2))
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_all_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    table, _, model = capsys.readouterr().out.partition("\n\n")
    lines = table.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:8] == ["step_00000002", "2", "tensor", "1", "x", "pipeline", "1", "x"]
    assert all("whole (names and sizes of files are right)" in line for line in lines[1:])
    assert "hidden size" in model
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step_00000002").iterdir())
    assert f"  {size:,}  " in lines[1]


def test_a_flipped_bit_is_found_by_reading_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data,) = (run / "checkpoints" / "step_00000004").glob("*.distcp")
    flip(data, 2000)
    assert main(["inspect", str(run)]) == 0
    assert main(["inspect", str(run), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert out.count("distcp has changed since it was written") == 1
    assert err.count("step_00000004 (") == 1
    assert "cannot be read: a run that resumes goes on from step_00000006, and sets later ones aside" in err
    assert [row.fault is None for row in list_checkpoints(run, verify=True)] == [True, False, True]
    assert main(["inspect", str(data.parent), "--verify"]) == 2
    assert f"{data.parent} cannot be read (" in capsys.readouterr().err


def test_those_set_aside_are_listed_and_no_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / "step_00000006"
    (newest / ".metadata").unlink()
    assert main(["inspect", str(run)]) == 2
    newest.rename(newest.with_name("step_00000006.damaged"))
    capsys.readouterr()
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step_00000006.damaged  6 " in out
    assert "set aside as damaged: .metadata is missing" in out


def test_without_a_whole_one_it_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged"))
    assert main(["inspect", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out.count("set aside as damaged") == 3
    assert "all cannot be read: none is whole, so bring one back from a copy" in err


def test_what_has_no_checksums(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "step_00000006"
    (checkpoint / MANIFEST_FILE).unlink()
    state = checkpoint / "state.json"
    state.write_text(state.read_text().replace('"manifest": "manifest.json"', '"other": 1'))
    (row,) = list_checkpoints(checkpoint, verify=True)
    assert row.fault is None
    assert row.checked == "without checksums, of an older version"
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty"), "--verify"]) == 2
    assert "holds no checkpoint of a run, so it has no checksums: leave out --verify" in capsys.readouterr().err


def test_what_a_run_writes_is_known(whole: Path) -> None:
    assert {path.name for path in whole.iterdir() if path.is_dir()} <= {*RUN_FOLDERS}
    assert {RUN_FOLDER, MODEL_FOLDER, BATCHES_FOLDER, PROFILE_FOLDER} <= {*RUN_FOLDERS}
    assert {*RUN_FILES} == {METRICS_FILE, HEARTBEAT_FILE, LOCK_FILE}


@pytest.mark.parametrize("way", ["as it is", "checkpoints are a link", "its metrics are gone"])
@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step_00000004", "checkpoints/new", "model"])
def test_no_result_is_written_into_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, way: str
) -> None:
    if way == "checkpoints are a link":
        (run / "checkpoints").rename(tmp_path / "disk")
        (run / "checkpoints").symlink_to("../disk")
    elif way == "its metrics are gone":
        (run / METRICS_FILE).unlink()
    shutil.copytree(run / "checkpoints/step_00000002", tmp_path / "source")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["convert", str(tmp_path / "source"), str(run / place), "--to", "native", "--overwrite"]) == 2
    assert f"{run / place} belongs to the run in {run}, which could not go on" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step_00000004", "run/huggingface"])
def test_a_folder_of_a_runs_name_is_the_users(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert main(["convert", str(run), str(tmp_path / place), "--to", "huggingface"]) == 0
    assert main(["convert", str(run), str(tmp_path / place), "--to", "huggingface", "--overwrite"]) == 0
