# SPDX-License-Identifier: Apache-2.0
"""Packed data give every micro batch one shape, and compiled layers one graph."""

from __future__ import annotations

from collections.abc import Callable
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
from megatron_bert.training.run_state import StepSums
from megatron_bert.training.trainer import Trainer
from parallel.mesh import ParallelMesh
from parallel.process_group import World
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings
from tests.worlds import CPU, Together, preload_compiler

preload_compiler()


#: What is compiled, and how many graphs that makes.
COMPILED = [(True, 1), ("all", 6)]
#: What is sharded, and what is compiled of it beside what is not: layers are compiled alike with all else.
SHARDINGS = {"none": (False, True, "all"), "full": (False, "all")}
#: Enough to see that the second one and those after it compile nothing.
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    make_data(path)
    return path


@pytest.fixture(scope="module")
def together(folder: Path) -> Together:
    """One process, since its first compilation takes as long as several others."""
    graphs = [(1, _graphs_after_each_step, folder, compiled) for compiled, _ in COMPILED]
    return Together(*graphs, *((1, _all_losses, folder, sharding) for sharding in SHARDINGS))


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


def _trainer(folder: Path, compiled: bool | str, backend: str, **changes: object) -> Trainer:
    wanted = settings(folder, training__compile=compiled, **changes)
    mesh = ParallelMesh(check_settings(wanted, 1), CPU)
    objective = Pretraining(wanted, load_tokenizer(wanted.tokenizer.path))
    with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
        return Trainer(wanted, objective, mesh, World(rank=0, size=1, local_rank=0, device=CPU), None)


def _trained(trainer: Trainer, steps: int, after: Callable[[StepSums], None]) -> None:
    batches = trainer.objective.training_batches(trainer.mesh, 0, steps, CPU)
    for _ in range(steps):
        after(trainer.train_step([next(batches) for _ in range(trainer.engine.schedule.microbatches)]))
    trainer.close()


def _graphs_after_each_step(folder: Path, compiled: bool | str) -> list[int]:
    """Of training with compiled code and dropout."""
    trainer = _trainer(folder, compiled, "eager")
    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []

    def count(_: StepSums) -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]

    _trained(trainer, STEPS, count)
    return graphs


@pytest.mark.parametrize(("compiled", "expected"), COMPILED)
def test_nothing_is_compiled_after_the_first_step(
    folder: Path, together: Together, compiled: bool | str, expected: int
) -> None:
    """All: dropout keys of tokens and of layers, the sum of embeddings, a layer, the head and the losses."""
    graphs = together(1, _graphs_after_each_step, folder, compiled)[0]
    assert graphs == [expected] * STEPS


def _never(_: torch.Tensor) -> bool:
    return False


def _losses(folder: Path, compiled: bool | str, backend: str, sharding: str) -> list[list[float]]:
    """Losses and the gradient's norm of three steps, with dropout, as compiled code has them."""
    found: list[list[float]] = []
    with (
        mock.patch("megatron_bert.model.attention.in_parts", _never),
        mock.patch.object(Trainer, "compute_gradients", Trainer.compute_gradients.__wrapped__),  # not in place
        mock.patch("megatron_bert.model.layer.TransformerLayer.selects", return_value=False),
    ):
        trainer = _trainer(folder, compiled, backend, parallel__sharding=sharding)
        _trained(trainer, 3, lambda sums: found.append([*sums.losses.tolist(), sums.grad_norm.item()]))
    return found


def _all_losses(folder: Path, sharding: str) -> list[list[list[float]]]:
    found = []
    for compiled in SHARDINGS[sharding]:
        torch._dynamo.reset()
        found.append(_losses(folder, compiled, "aot_eager", sharding))
    return found


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_compiled_code_computes_the_same_losses(folder: Path, together: Together, sharding: str) -> None:
    """To the last bit, as torch differentiates it before a compiler fuses it."""
    plain, *compiled = together(1, _all_losses, folder, sharding)[0]
    assert compiled == [plain] * (len(SHARDINGS[sharding]) - 1)
