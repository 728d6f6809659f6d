"""What breaks on the disk while a run trains: it goes on, and says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.finetuning.finetune import finetune
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import whole_checkpoints
from tests.megatron_bert.finetuning.support import make_run
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import STEPS, run_settings

Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def break_in_step(monkeypatch: pytest.MonkeyPatch, step: int, fault: Fault) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step - 1:
            self.checkpoints.finish()  # so that it is known what is there
            fault(self.settings.training.run_dir)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def remove(name: str) -> Fault:
    def fault(run_dir: Path) -> None:
        target = run_dir / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    return fault


def block(name: str) -> Fault:
    """Something of another kind is where a directory, a file or a checkpoint is to be."""

    def fault(run_dir: Path) -> None:
        target = run_dir / name
        if target.is_dir():
            shutil.rmtree(target)
            target.touch()
        elif target.is_file():
            target.unlink()
            target.mkdir()
        else:
            target.touch()

    return fault


FAULTS = {
    "run directory": (remove("."), f"{METRICS_FILE} was removed or replaced"),
    "checkpoints": (remove("checkpoints"), ""),
    "metrics": (remove(METRICS_FILE), f"{METRICS_FILE} was removed or replaced"),
    "a directory for metrics": (block(METRICS_FILE), f"warning: {METRICS_FILE} cannot be written (Is a directory)"),
    "a file for TensorBoard": (block("tensorboard"), "warning: TensorBoard's events cannot be written (File exists)"),
    "a file for traces": (block("traces"), "warning: the trace of a step cannot be written (File exists)"),
    "a file for curves": (block("curves.png"), ""),
    "a file for a checkpoint": (block("checkpoints/step_00000004"), ""),
    "a file for a partial one": (block("checkpoints/step_00000004.partial"), ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_pretraining(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fault, says = FAULTS[name]
    break_in_step(monkeypatch, 3, fault)
    monkeypatch.setattr("megatron_bert.training.timeline.gantt_png", lambda *_: None)  # drawing takes long
    more = {"logging__tensorboard": "Tensor" in name, "logging__trace": "traces" in name}
    run_dir = tmp_path / "run"
    pretrain(run_settings(data, run_dir, checkpoint__every=2, **more))
    output = capsys.readouterr().out
    assert says in output
    assert not says or output.count(says) == 1
    assert list(whole_checkpoints(run_dir / "checkpoints"))[-2:] == [4, 6]
    if name != "a directory for metrics":
        assert read_metrics(run_dir / METRICS_FILE)[-1]["step"] == STEPS


def test_finetuning_and_quantising(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        break_in_step(patch, 3, remove("."))
        finetune(make_run(tmp_path, training__epochs=1))
        output = capsys.readouterr().out
        assert "was removed or replaced" in output
    assert (tmp_path / "run" / "results.json").exists()
    with monkeypatch.context() as patch:
        break_in_step(patch, 2, block(METRICS_FILE))
        quantize(quantize_settings(tmp_path))
        assert f"warning: {METRICS_FILE} cannot be written (Is a directory)" in capsys.readouterr().out
    assert (tmp_path / "quantized" / "results.json").exists()
