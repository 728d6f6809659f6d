# SPDX-License-Identifier: Apache-2.0
"""What the tests beside this one show of pretraining holds for fine-tuning and quantization: they are one trainer."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.training import run_lock
from megatron_bert.training.metrics_file import METRICS_FILE
from megatron_bert.training.signals import STOPPED_FILE
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import whole_checkpoints
from parallel.errors import UserError
from tests.commands import run_ranks
from tests.megatron_bert.finetuning.support import join_world, make_run, run_settings
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.megatron_bert.training.faults import FAULTS, Damage, break_in_step, cut, flip, lose, without_checksums
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows, write_config
from tests.megatron_bert.training.test_divergence import before_step, faulty, put
from tests.megatron_bert.training.test_missing_ranks import stand_still
from tests.megatron_bert.training.test_replicas import damage as damage_copy
from tests.megatron_bert.training.test_run_lock import left_by
from tests.worlds import Together

COMMANDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "finetune": (run_settings, finetune),
    "quantize": (quantize_settings, quantize),
}
STEPS = 6
WEIGHT = "classifier.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, an encoder, and a run that has fine-tuned it, for quantization."""
    place = tmp_path_factory.mktemp("model")
    finetune(make_run(place, layers=2))
    return place


def settings(command: str, folder: Path, run_dir: Path, **changes: Any) -> FinetuneSettings | QuantizeSettings:
    """Settings of a run of a few steps that saves every other one."""
    given = {"training__steps": STEPS, "checkpoint__every": 2, "checkpoint__keep": 0, "training__run_dir": run_dir}
    given |= {"training__evaluate_every": 2}
    return COMMANDS[command][0](folder, **given | changes)


class KilledError(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module", params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    """Name of the command."""
    return request.param


@pytest.fixture(scope="module")
def whole(command: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp(command) / "whole"
    COMMANDS[command][1](settings(command, folder, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def stopped(command: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in step 5."""
    run_dir = tmp_path_factory.mktemp(command) / "stopped"

    def kill(_: Trainer) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 5, kill)
        with pytest.raises(KilledError):
            COMMANDS[command][1](settings(command, folder, run_dir))
    return run_dir


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def go_on(command: str, folder: Path, run: Path, whole: Path) -> None:
    """Start it again: it ends like the whole run."""
    COMMANDS[command][1](settings(command, folder, run))
    assert rows(run) == rows(whole)
    name = f"checkpoints/step_{STEPS:08d}"
    assert_same_checkpoint(run / name, whole / name)
    assert (
        json.loads((run / "results.json").read_text())["splits"]
        == (json.loads((whole / "results.json").read_text())["splits"])
    )


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip("*.distcp", 2000), "distcp has changed since it was written"),
        (lose(".metadata"), ".metadata is missing"),
        (without_checksums(cut("state.json")), "state.json is damaged"),
    ],
)
def test_a_damaged_checkpoint(
    command: str,
    folder: Path,
    run: Path,
    whole: Path,
    damage: Damage,
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(run / "checkpoints" / "step_00000004")
    go_on(command, folder, run, whole)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "damaged: steps 3 to 4" in line]
    assert fault in note
    assert (run / "checkpoints" / "step_00000004.damaged").is_dir()


def test_a_broken_row_of_metrics(
    command: str, folder: Path, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / METRICS_FILE).read_bytes().splitlines(keepends=True)
    (run / METRICS_FILE).write_bytes(b"".join([lines[0], b"\xff{broken\n", *lines[1:]]))
    go_on(command, folder, run, whole)
    assert METRICS_FILE in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["run directory", "checkpoints", "a directory for metrics", "a file for a partial one"]
)
def test_disks(
    command: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    fault, says = FAULTS[name]
    break_in_step(monkeypatch, 3, fault)
    COMMANDS[command][1](settings(command, folder, tmp_path / "run"))
    assert says in capsys.readouterr().out
    assert list(whole_checkpoints(tmp_path / "run" / "checkpoints"))[-2:] == [4, STEPS]
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put(WEIGHT, float("nan"), 3), r"^step 3 is not finite because values were damaged before it: 3 of the values"),
        (
            put(WEIGHT, 1e30),
            r"^at step 3 the loss is .* because of weights out of all proportion: model\.classifier\.",
        ),
        (faulty(100, part=""), r"^training diverged: at step 3 the loss is .* lower learning_rate\.peak"),
    ],
    ids=["NaN", "flipped bit", "forward"],
)
def test_wrong_values(
    command: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Trainer], None],
    sentence: str,
) -> None:
    if command == "quantize" and "proportion" in sentence:
        pytest.skip("integers saturate: the loss and the gradient stay finite")
    before_step(monkeypatch, 3, change)
    with pytest.raises(UserError, match=sentence):
        COMMANDS[command][1](settings(command, folder, tmp_path / "run"))
    assert list(whole_checkpoints(tmp_path / "run" / "checkpoints")) == [2]
    assert list((tmp_path / "run" / "diverged").glob("step_*_data_0000.npz"))


def damaged_copy(command: str, folder: Path, run_dir: Path) -> str:
    """How a run ends that has a damaged copy of weights on one of two ranks."""
    join_world()

    def change(trainer: Trainer) -> None:
        if dist.get_rank() == 1:
            damage_copy(trainer, WEIGHT)

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 4, change)
        try:
            COMMANDS[command][1](settings(command, folder, run_dir, parallel__data=2))
        except UserError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the run directories of these runs."""
    return tmp_path_factory.mktemp("copied")


@pytest.fixture(scope="module")
def together(folder: Path, copied: Path) -> Together:
    return Together(*((2, damaged_copy, command, folder, copied / command) for command in COMMANDS))


def test_a_damaged_copy(command: str, folder: Path, copied: Path, together: Together) -> None:
    run = copied / command
    said = together(2, damaged_copy, command, folder, run)
    assert said[0] == said[1]
    assert re.match(rf"rank 1 \(.*\) holds other values than .* copies of .*{re.escape(WEIGHT)}", said[0])
    assert list(whole_checkpoints(run / "checkpoints")) == [2]


def test_a_rank_that_stands_still(command: str, folder: Path, tmp_path: Path) -> None:
    config = write_config(
        settings(command, folder, tmp_path / "run", parallel__data=2, parallel__timeout_seconds=4.0),
        tmp_path / "settings.yaml",
    )
    ended = run_ranks(
        2, command, str(config), folder=tmp_path, before=partial(stand_still, Trainer, "_finish_gradients", 1, 3)
    )
    assert ended[0].code == 1, ended
    assert re.search(r"LostRankError: rank 1 on \S+ \(process \d+\) does not answer", ended[0].text)


def test_a_signal_saves_and_ends(
    command: str, folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
        assert COMMANDS[command][1](settings(command, folder, run)) == "SIGTERM"
    assert json.loads((run / STOPPED_FILE).read_text()) == {"reason": "SIGTERM", "step": 3}
    assert list(whole_checkpoints(run / "checkpoints")) == [2, 3]
    assert not (run / "results.json").exists()
    go_on(command, folder, run, whole)


def test_a_second_process_is_refused(
    command: str,
    folder: Path,
    run: Path,
    child: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_lock, "GRACE_SECONDS", 0.0)
    left_by(run, pid=child, started=run_lock.process_start(child))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match=rf"is {run}, where process {child} .* is training: wait for it or stop it"):
        COMMANDS[command][1](settings(command, folder, run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
