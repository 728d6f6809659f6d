# SPDX-License-Identifier: Apache-2.0
"""Memory of CUDA graphs in closed form, and as tensors without numbers are made and dropped while they are recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_bert.config import Settings
from megatron_bert.planning.dry_run import longest_batch
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.memory import layout_of, rank_memory
from megatron_bert.planning.simulation import simulated_world, tensors_without_numbers
from megatron_bert.planning.workload import workload_of
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.mesh import ParallelMesh
from tests.megatron_bert.planning.support import Vocabulary, settings_of


class _Pool:
    """Memory that tensors take which are made while a graph is recorded, and that stays with the graphs at its most."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)

    def drop(self, size: int) -> None:
        self.held -= size


class _Making(TorchDispatchMode):
    def __init__(self, pool: _Pool) -> None:
        super().__init__()
        self.pool, self.known = pool, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.pool.take(storage.nbytes())
                    weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())
        return out

    def _died(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.pool.drop(size)


class _Recorders:
    """Records by running once, and replays nothing."""

    def __init__(self) -> None:
        self.pools: list[_Pool] = []

    def pool(self) -> _Pool:
        self.pools.append(_Pool())
        return self.pools[-1]

    def recorder(self, pool: _Pool) -> _Recorder:
        return _Recorder(pool)


class _Recorder:
    def __init__(self, pool: _Pool) -> None:
        self.pool = pool

    def record(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        with _Making(self.pool):
            return work()

    def mark(self) -> None:
        pass

    def hold(self) -> None:
        pass

    def replay(self, behind: Callable[[], None] | None = None, ahead: Callable[[], None] | None = None) -> None:
        pass


def _recorded(settings: Settings, rank: int, world_size: int, folder: Path) -> int:
    """Bytes of all pools of a rank's graphs, and of the gradients and activations that these are given."""
    training = settings.training.model_copy(update={"run_dir": folder})
    settings = settings.model_copy(update={"training": training})
    batch, recorders = longest_batch(settings), _Recorders()
    with simulated_world(rank, world_size) as world:
        mesh = ParallelMesh(settings.layout(world_size), world.device)
        with tensors_without_numbers(gpu=True):
            objective = Pretraining(settings, Vocabulary())  # type: ignore[arg-type]
            trainer = Trainer(settings, objective, mesh, world, None)
            trainer.watch.at_once = False
            assert trainer.graphs is not None
            trainer.graphs.plain_steps, trainer.graphs.passes.recorders = 0, recorders
            trainer.train_step([batch] * trainer.engine.schedule.microbatches)
            graphs = trainer.graphs.passes.graphs.values()
            given = sum(tensor.nbytes for graph in graphs for tensor in graph._given.values() if tensor.dim() > 1)
            return sum(pool.most for pool in recorders.pools) + given


@pytest.mark.parametrize(
    ("pipeline", "schedule", "recompute"),
    [
        (1, "1f1b", "none"),
        (4, "1f1b", "full"),
        (2, "interleaved-1f1b", "selective"),
        (2, "zero-bubble-h1", "none"),
        (2, "zero-bubble-v", "full"),
    ],
)
def test_memory_of_graphs_is_what_recording_them_takes(
    pipeline: int, schedule: str, recompute: str, tmp_path: Path
) -> None:
    settings = settings_of(
        "model.hidden_size=128",
        "model.num_hidden_layers=8",
        "model.attention_probs_dropout_prob=0",
        "data.packed=true",
        "data.seq_length=128",
        "precision.compute=bfloat16",
        "training.cuda_graphs=true",
        f"training.global_batch_size={8 * pipeline}",
        f"training.recompute={recompute}",
        f"parallel.pipeline={pipeline}",
        f"parallel.schedule={schedule}",
    )
    layout = layout_of(settings, pipeline)
    workload = workload_of(settings, settings.model_config_for(Vocabulary.vocab_size, 0), 1, 128)
    assert workload.graphs
    for rank in {0, pipeline - 1}:
        parts = rank_memory(workload, layout, stages_of(workload, layout), rank).parts
        predicted = sum(parts[part] for part in ("activations", "logits", "temporaries"))
        found = _recorded(settings, rank, pipeline, tmp_path)
        assert predicted == pytest.approx(found, rel=0.07), rank
