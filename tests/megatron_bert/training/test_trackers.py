# SPDX-License-Identifier: Apache-2.0
"""Trackers get what metrics.jsonl gets, go on with the run, and never end it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_bert.config_sections import LoggingSettings
from megatron_bert.tables import TRACKERS
from megatron_bert.training.metrics import Report
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from parallel.errors import UserError

ROW = {"loss": 2.5, "mlm_loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 10.0}


class FakeWandb(SimpleNamespace):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(started=[], logged=[], ended=[], down=False)

    def init(self, **options: Any) -> FakeWandb:
        self.started.append(options)
        return self

    def log(self, values: dict[str, float]) -> None:
        if self.down:
            raise RuntimeError("the service\nis down")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


class FakeMlflow(SimpleNamespace):
    """A client that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(params={}, metrics=[], states=[], runs=0)

    def MlflowClient(self, tracking_uri: str) -> FakeMlflow:
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.runs += 1
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment}-{run_name}"))

    def log_param(self, run: str, name: str, value: str) -> None:
        self.params[name] = value

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.metrics.append((run, name, value, step))

    def set_terminated(self, run: str, state: str) -> None:
        self.states.append(state)


def report(run_dir: Path, *trackers: str, start: int = 0) -> Report:
    settings = LoggingSettings(trackers=list(trackers), tensorboard=False)
    return Report(run_dir, settings, active=True, start=start, steps=8)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"training": {"steps": 8}, "data": {"train": ["x"]}}))
    return folder


def test_none_by_default(run_dir: Path) -> None:
    assert LoggingSettings().trackers == []
    with report(run_dir) as made:
        assert made.trackers == {}


def test_wandb(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    with report(run_dir, "wandb") as made:
        made.step({"step": 1, **ROW})
        fake.down = True
        made.step({"step": 2, **ROW})
        made.step({"step": 3, **ROW})
        fake.down = False
        made.evaluation(4, {"mlm_loss": 2.25})
    assert [values["step"] for values in fake.logged] == [1, 4]
    assert fake.logged[0]["train/mlm_loss"] == 2.0
    assert fake.logged[1] == {"valid/mlm_loss": 2.25, "step": 4}
    assert [row["step"] for row in read_metrics(run_dir / METRICS_FILE)] == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert out.count("warning: what wandb is to get cannot be written (the service is down)") == 1
    with pytest.raises(ValueError, match="broken"), report(run_dir, "wandb", start=4):
        raise ValueError("broken")
    assert fake.ended == [0, 1]
    first, second = fake.started
    assert (first["project"], first["name"], first["config"]["training"]) == ("megatron-bert", "run", {"steps": 8})
    assert first["id"] == second["id"], "a run that goes on is one run there too"


def test_mlflow(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for start in (0, 1):
        with report(run_dir, "mlflow", start=start) as made:
            made.step({"step": start + 1, **ROW})
    assert fake.uri == (run_dir / "mlruns").as_uri()
    assert fake.params == {"training.steps": "8", "data.train": "['x']"}
    assert ("megatron-bert-run", "train/loss", 2.5, 2) in fake.metrics
    assert (fake.runs, fake.states) == (1, ["FINISHED", "RUNNING", "FINISHED"])


def test_a_line_in_the_table_is_enough(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="choose one of wandb, mlflow"):
        LoggingSettings(trackers=["fake"])
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(TRACKERS, "fake", TRACKERS["wandb"])
    with report(run_dir, "fake") as made:
        made.step({"step": 1, **ROW})
    assert fake.logged[0]["train/loss"] == 2.5


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=rf"{name}, which cannot be imported \(.*\): pip install 'megatron-bert\[{name}\]'"
    ):
        report(run_dir, name)


def test_one_that_does_not_start(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"logging.trackers: wandb does not start \(no login\)"):
        report(run_dir, "wandb")
