# SPDX-License-Identifier: Apache-2.0
"""Memory of a step by part: as closed forms have it, and exact for what stays between steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.planning.dry_run import longest_batch
from megatron_bert.planning.kept import head_tensors
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.measuring import StepMeter
from megatron_bert.planning.memory import layout_of, rank_memory
from megatron_bert.planning.simulation import simulated_world, tensors_without_numbers
from megatron_bert.planning.workload import workload_of
from megatron_bert.training.memory import PARTS, MemoryMeter
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.mesh import ParallelMesh
from tests.integration.slurm_cluster import free_ports
from tests.integration.slurm_runs import undisturbed
from tests.megatron_bert.planning.support import Vocabulary, settings_of
from tests.megatron_bert.training.runs import run_settings
from tests.worlds import run_world


class CountingAllocator:
    """Stands for that of a GPU: counts the tensors of simulated steps."""

    def __init__(self, meter: StepMeter) -> None:
        self.meter = meter

    def allocated(self) -> int:
        return self.meter._total

    def peak(self) -> int:
        return max(self.meter._peak_total, self.meter._total)

    def reserved(self) -> int:
        return 10**9

    def restart(self) -> None:
        self.meter._peak_total = 0


@pytest.mark.parametrize(
    ("rank", "ranks", "overrides"),
    [
        (0, 1, []),
        (3, 4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
        (0, 2, ["parallel.pipeline=2", "parallel.schedule=zero-bubble-v"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_parts_are_those_of_closed_forms(rank: int, ranks: int, overrides: list[str]) -> None:
    sizes = ["model.hidden_size=256", "data.seq_length=256", "training.micro_batch_size=8"]
    settings = settings_of(*sizes, "training.global_batch_size=32", *overrides)
    work = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, settings.data.seq_length)
    layout = layout_of(settings, ranks)
    expected = rank_memory(work, layout, stages_of(work, layout), rank // (ranks // layout.pipeline))
    batch = longest_batch(settings)
    with simulated_world(rank, ranks) as world:
        mesh, meter = ParallelMesh(settings.layout(ranks), world.device), StepMeter({})
        with tensors_without_numbers(gpu=True), meter.counting():
            trainer = Trainer(settings, Pretraining(settings, Vocabulary()), mesh, world, None)  # type: ignore[arg-type]
            trainer.watch.at_once = False
            memory = MemoryMeter(trainer, CountingAllocator(meter))
            with memory.measuring():
                trainer.train_step([batch] * trainer.engine.schedule.microbatches)
            replayed = MemoryMeter(trainer, CountingAllocator(meter))
            with replayed.measuring():
                pass  # as far as the host knows
    assert replayed.parts["peak"] == sum(replayed.parts[part] for part in PARTS if part in replayed.parts) == 10**9
    found = memory.parts
    assert trainer.engine.after_action is None
    assert found["weights"] == pytest.approx(expected.parts["weights"], rel=1e-3)
    assert found["optimizer"] == pytest.approx(expected.parts["optimizer"], rel=1e-3)
    assert found["gradients"] == pytest.approx(expected.parts["gradients"], rel=1e-3)
    assert sum(found[part] for part in PARTS) == found["peak"] == pytest.approx(expected.peak, rel=0.03)
    kept = expected.parts["activations"] + expected.parts["logits"]
    assert found["activations"] + found["logits"] == pytest.approx(kept, rel=0.06)
    head = head_tensors(work, layout)
    if in_flight := expected.parts["logits"] / head.logits:
        assert found["logits"] == pytest.approx(in_flight * (head.logits + head.kept), rel=0.03)


def test_nothing_is_asked_of_steps_that_are_not_due() -> None:
    memory = MemoryMeter(None, CountingAllocator(None))  # type: ignore[arg-type]
    with memory.measuring(False):
        pass
    assert memory.read() == {}


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / METRICS_FILE) if "loss" in row]


def test_on_a_processor_states_are_exact_and_the_peak_is_of_the_process(data: Path, tmp_path: Path) -> None:
    settings = run_settings(data, tmp_path, logging__every=4, logging__profile="2:3", precision__compute="bfloat16")
    pretrain(settings)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [4, 6]
    for row in found:
        elements = row["memory_weights"] // 2
        assert row["memory_gradients"] == 4 * elements
        assert 11.5 * elements < row["memory_optimizer"] <= 12 * elements, "what fills buffers up has no moments"
        states = sum(row[f"memory_{part}"] for part in ("weights", "gradients", "optimizer"))
        assert row["memory_buffers"] == row["memory_peak"] - states > 0
        assert not {"memory_activations", "memory_logits", "memory_rank"} & row.keys()
    (profiled,) = json.loads((tmp_path / "profile" / "steps_2_to_3.json").read_text())["ranks"]
    assert profiled["memory"]["weights"] == found[0]["memory_weights"]
    assert "optimizer" in (tmp_path / "profile" / "steps_2_to_3.txt").read_text().partition("memory")[2]


def test_of_several_ranks_the_fullest_is_reported(data: Path, tmp_path: Path) -> None:
    settings = run_settings(data, tmp_path, model__num_hidden_layers=2, parallel__pipeline=2, logging__every=6)
    run_world(2, undisturbed, settings, free_ports(1)[0])
    (row,) = rows(tmp_path)
    assert row["memory_rank"] in (0, 1)
    assert row["memory_peak"] > row["memory_weights"] > 0
