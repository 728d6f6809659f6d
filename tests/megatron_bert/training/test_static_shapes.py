# SPDX-License-Identifier: Apache-2.0
"""Packed data give every micro batch one shape, and compiled layers one graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.data.loader import MicroBatchSource
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.mesh import ParallelMesh
from parallel.process_group import World
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings
from tests.worlds import CPU, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    make_data(path)
    return path


def settings(folder: Path, **changes: object) -> Settings:
    return run_settings(folder, folder / "run", data__packed=True, **changes)


def test_a_thousand_micro_batches_have_one_shape(folder: Path) -> None:
    source = MicroBatchSource(settings(folder), "train", data_rank=0, data_size=1)
    shapes = set()
    for index in range(1000):
        batch = source[index]
        tensors = batch.tensors() | {
            name: getattr(batch.layout, name) for name in ("boundaries", "places", "owners", "row_positions")
        }
        shapes.add(tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors.items()))
    assert len(shapes) == 1
    assert source.open_rows().samples_before(4000) > 4000, "most rows hold several samples"


def _graphs_after_each_step(folder: Path) -> list[int]:
    """Of training with compiled layers and dropout, and an evaluation after the second step."""
    wanted = settings(folder, training__compile=True)
    mesh = ParallelMesh(check_settings(wanted, 1), CPU)
    objective = Pretraining(wanted, load_tokenizer(wanted.tokenizer.path))
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        trainer = Trainer(wanted, objective, mesh, World(rank=0, size=1, local_rank=0, device=CPU), None)
    batches = trainer.objective.training_batches(mesh, 0, 12, CPU)
    counters.clear()
    graphs = []
    for _ in range(12):
        trainer.train_step([next(batches) for _ in range(trainer.engine.schedule.microbatches)])
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    return graphs


def test_nothing_is_compiled_after_the_first_step(folder: Path) -> None:
    graphs = run_world(1, _graphs_after_each_step, folder)[0]
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
