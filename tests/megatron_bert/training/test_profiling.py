# SPDX-License-Identifier: Apache-2.0
"""A profile of a few steps says where the time went, and changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.profiling import as_table, usage
from parallel.errors import UserError
from tests.integration.slurm_cluster import free_ports
from tests.integration.slurm_runs import undisturbed
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows, run_settings
from tests.worlds import run_world


def test_tables_and_a_trace(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(run_settings(data, tmp_path / "plain"))
    capsys.readouterr()
    run = tmp_path / "run"
    pretrain(run_settings(data, run, logging__profile="3:4"))
    assert rows(run) == rows(tmp_path / "plain")
    last = Path("checkpoints") / "step_00000006"
    assert_same_checkpoint(run / last, tmp_path / "plain" / last)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile of steps 3 to 4: rank 0")]
    assert len(said) == 1
    (found,) = json.loads((run / "profile" / "steps_3_to_4.json").read_text())["ranks"]
    assert found["steps"] == 2
    assert found["idle_share"] is None, "there is no GPU"
    parts = ("embeddings", "layers: attention", "layers: MLP", "layers: the rest", "loss", "head: pair_head")
    assert {*parts, *(f"{part}, backward" for part in parts), "optimizer"} <= set(found["host"])
    assert all(found["host"][part] > 0 for part in parts)
    assert sum(found["host"].values()) <= found["wall_seconds"]
    assert found["kinds"]["matrix products"] > 0
    table = (run / "profile" / "steps_3_to_4.txt").read_text()
    assert "layers: attention, backward" in table
    with gzip.open(run / "profile" / "steps_3_to_4_rank_00000.json.gz", "rt") as file:
        assert any("part: optimizer" in event.get("name", "") for event in json.load(file)["traceEvents"])


def test_each_pipeline_stage_has_its_own(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {"model__num_hidden_layers": 2, "parallel__pipeline": 2, "parallel__tensor": 2}
    settings = run_settings(data, run, logging__profile="2:9", **changes)
    run_world(4, undisturbed, settings, free_ports(1)[0])
    ranks = json.loads((run / "profile" / "steps_2_to_6.json").read_text())["ranks"]
    assert [one["steps"] for one in ranks] == [5, 5]
    assert ["loss" in one["host"] for one in ranks] == [False, True]
    assert len(list((run / "profile").glob("*.json.gz"))) == 2


def test_a_folder_that_cannot_be_is_a_warning(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    pretrain(run_settings(data, tmp_path / "run", logging__profile="2:2"))
    said = capsys.readouterr().out
    assert "its trace could not be written (File exists)" in said
    assert "warning: profile cannot be written (" in said


@pytest.mark.parametrize("value", ["3", "0:2", "4:3", "a:b", "1:2:3"])
def test_mistakes(data: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises((UserError, ValueError), match="profile"):
        run_settings(data, tmp_path, logging__profile=value)


def event(name: str, parent: Any = None, *, sequence: int = -1, start: float = 0, end: float = 0, **more: Any) -> Any:
    """One of torch's profiler."""
    given = {"device_type": DeviceType.CPU, "kernels": [], "self_cpu_time_total": end - start}
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=sequence, time_range=span, **given | more)


def kernel(name: str, duration: float) -> Any:
    """One that an operator has queued."""
    return SimpleNamespace(name=name, duration=duration)


def test_kernels_count_for_the_part_that_queued_them_and_idle_time_is_what_they_leave() -> None:
    mark = event("part: layers: MLP", end=100)
    product = event("aten::mm", mark, sequence=7, end=20, kernels=[kernel("sm90_xmma_gemm_bf16", 300)])
    backward = event("autograd::engine::evaluate_function: MmBackward0", sequence=7, end=10)
    gradient = event("aten::mm", backward, end=5, kernels=[kernel("cutlass_80", 500), kernel("vectorized_add", 100)])
    alone = event("aten::add", end=3, kernels=[kernel("ncclDevKernel_AllReduce", 50)])
    on_gpu = [
        event("sm90_xmma_gemm_bf16", start=0, end=300, device_type=DeviceType.CUDA),
        event("cutlass_80", start=400, end=900, device_type=DeviceType.CUDA),
        event("vectorized_add", start=850, end=950, device_type=DeviceType.CUDA),
    ]
    found = usage([mark, product, backward, gradient, alone, *on_gpu], rank=3, steps=2, wall_seconds=0.001)
    assert found.device == {
        "layers: MLP": pytest.approx(300e-6),
        "layers: MLP, backward": pytest.approx(600e-6),
        "other": pytest.approx(50e-6),
    }
    assert found.kinds["matrix products"] == pytest.approx(800e-6)
    assert found.kinds["communication"] == pytest.approx(50e-6)
    assert found.kernels == 4
    assert found.busy_seconds == pytest.approx(850e-6)
    assert found.idle_share == pytest.approx(0.15)
    assert "device idle 15.0%; 2 kernels per step" in as_table(found)
