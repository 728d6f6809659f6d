# SPDX-License-Identifier: Apache-2.0
"""Steps whose micro batches are recorded once and replayed; on processors a tape stands for a CUDA graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from parallel.flat_buffers import FlatBuffers
from parallel.mesh import ParallelMesh
from parallel.process_group import World
from tests.megatron_bert.training.runs import run_settings
from tests.parallel.tape import NoWaiting, Tapes
from tests.worlds import CPU, Together, preload_compiler

preload_compiler()

#: Of two micro batches the last two replay, of more the last three.
STEPS = 4
PIPELINE = {"parallel__pipeline": 2, "parallel__data": None, "model__num_hidden_layers": 2}
PIPELINE |= {"training__global_batch_size": 16, "training__micro_batch_size": 4}


SHARDINGS = ["none", "optimizer"]


def _never(_: torch.Tensor) -> bool:
    return False


def _settings(folder: Path, run: Path, graphs: bool, changes: dict[str, Any]) -> Settings:
    return run_settings(folder, run, **{"data__packed": True, "training__cuda_graphs": graphs} | changes)


def _trainer(
    settings: Settings, rank: int, size: int, resume: Path | None = None, backend: str = "aot_eager"
) -> Trainer:
    """As on a GPU, where packed sequences are not attended to run by run."""
    mesh = ParallelMesh(settings.layout(size), CPU)
    objective = Pretraining(settings, load_tokenizer(settings.tokenizer.path))
    objective.prepare(mesh, World(rank=rank, size=size, local_rank=rank, device=CPU))
    with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
        trainer = Trainer(settings, objective, mesh, World(rank=rank, size=size, local_rank=rank, device=CPU), resume)
    trainer.watch.at_once = False
    return trainer


def _trained(
    folder: Path, run: Path, graphs: bool, changes: dict[str, Any], resume: Path | None = None, save_at: int = 0
) -> tuple[list[list[float]], torch.Tensor]:
    """Losses and gradient norms of a run's steps, and its weights."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tapes, found = Tapes(), []
    with (
        mock.patch("megatron_bert.model.attention.in_parts", _never),
        mock.patch("megatron_bert.training.graphs.CudaRecorders", return_value=tapes),
    ):
        trainer = _trainer(_settings(folder, run, graphs, changes), rank, size, resume)
        steps = STEPS - trainer.step
        batches = trainer._batches()
        count = trainer.engine.schedule.microbatches
        for _ in range(steps):
            sums = trainer.train_step([next(batches) for _ in range(count)])
            found.append([*sums.losses.tolist(), sums.grad_norm.item()])
            if trainer.step == save_at:
                trainer.checkpoints.prepare()
                trainer.save()
                trainer.checkpoints.finish()
    trainer.watch.check()
    for buffers in trainer.optimizer.buffers:
        buffers.wait()
    kinds = 1 + len(trainer.engine.schedule.backward.kinds)
    replayed = (steps - -(-3 // count)) * count * kinds * trainer.engine.schedule.chunks
    assert sum(tape.replays for tape in tapes.made) == (replayed if graphs else 0)
    assert all(tape.replays for tape in tapes.made)
    weights = torch.cat([buffers.weights for buffers in trainer.optimizer.buffers])
    trainer.close()
    return found, weights


def _both(folder: Path, run: Path, changes: dict[str, Any]) -> list[tuple[list[list[float]], torch.Tensor]]:
    return [_trained(folder, run, graphs, changes) for graphs in (False, True)]


#: World size and settings, by name.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "compiled": (1, {"precision__compute": "bfloat16", "training__compile": "all"}),
    "data": (2, {"parallel__data": 2, "parallel__sharding": "optimizer", "precision__compute": "bfloat16"}),
    "tensor": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "1f1b": (2, PIPELINE | {"training__recompute": "full", "precision__compute": "bfloat16"}),
    "compiled stages": (2, PIPELINE | {"training__recompute": "selective", "training__compile": True}),
    "interleaved": (2, PIPELINE | {"parallel__schedule": "interleaved-1f1b", "model__num_hidden_layers": 4}),
    "zero-bubble-v": (2, PIPELINE | {"parallel__schedule": "zero-bubble-v", "model__num_hidden_layers": 4}),
    "h1": (4, PIPELINE | {"parallel__schedule": "zero-bubble-h1", "parallel__data": 2, "training__recompute": "full"}),
}


def _both_of(folder: Path, run: Path, kind: str) -> list[tuple[list[list[float]], torch.Tensor]]:
    torch._dynamo.reset()  # it has compiled for other settings
    return _both(folder, run / kind, KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_are_those_without(together: Together, data: Path, runs: Path, kind: str) -> None:
    """To the last bit, dropout on, over two micro batches a step."""
    for plain, replayed in together(KINDS[kind][0], _both_of, data, runs, kind):
        assert plain[0] == replayed[0]
        assert torch.equal(plain[1], replayed[1])


def _train(trainer: Trainer, number: int, steps: list[list[int]], left: list[int]) -> None:
    """Take steps: what is noted in each has a list of its own, and what is left is that of the last one."""
    batches, count = trainer._batches(), trainer.engine.schedule.microbatches
    for _ in range(number):
        steps.append([])
        left.clear()
        trainer.train_step([next(batches) for _ in range(count)])
    trainer.close()


def _sums(folder: Path, run: Path, changes: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    """The buckets of each step in the order in which their sums begin, and what is left of the replay then."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tapes, steps, left, reduce = Tapes(), [], [], FlatBuffers._reduce

    def noted(buffers: FlatBuffers, bucket: Any) -> None:
        steps[-1].append(buffers.buckets.index(bucket))
        left.append(sum(tape.left for tape in tapes.made))
        reduce(buffers, bucket)

    with (
        mock.patch("megatron_bert.model.attention.in_parts", _never),
        mock.patch("megatron_bert.training.graphs.CudaRecorders", return_value=tapes),
        mock.patch("parallel.data_parallel._GROUP_PARAMETERS", 1),
        mock.patch.object(FlatBuffers, "_reduce", noted),
    ):
        trainer = _trainer(_settings(folder, run, True, changes), rank, size)
        _train(trainer, 3, steps, left)
    return steps, left


def _sums_of(folder: Path, run: Path, sharding: str) -> tuple[list[list[int]], list[int]]:
    changes = {"parallel__data": 2, "parallel__sharding": sharding, "model__num_hidden_layers": 4}
    return _sums(folder, run / f"sums {sharding}", changes | {"training__global_batch_size": 16})


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sums_over_data_ranks_begin_behind_the_gradients_of_their_bucket(
    together: Together, data: Path, runs: Path, sharding: str
) -> None:
    for (_, plain, replayed), left in together(2, _sums_of, data, runs, sharding):
        assert replayed == plain == [4, 3, 2, 1, 0], "once each, in the order of plain passes"
        assert left == sorted(left, reverse=True)
        assert len(set(left)) == 5, "one after the other, while the backward pass goes on"
        assert left[-2] > 0


def _gathers(folder: Path, run: Path, changes: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    """Of each step but the first, the buckets in the order in which they are waited for, and what is left then."""
    tapes, steps, left, wait = Tapes(), [], [], FlatBuffers.wait

    def noted(buffers: FlatBuffers, buckets: Any = None) -> None:
        pending = [bucket for bucket in (buffers.buckets if buckets is None else buckets) if bucket.gathering]
        steps[-1].extend(map(buffers.buckets.index, pending))
        left.extend([sum(tape.left for tape in tapes.made)] * len(pending))
        wait(buffers, pending)

    with (
        mock.patch("megatron_bert.training.graphs.CudaRecorders", return_value=tapes),
        mock.patch.object(FlatBuffers, "wait", noted),
    ):
        steps.append([])
        trainer = _trainer(_settings(folder, run, True, changes), dist.get_rank(), dist.get_world_size())
        _train(trainer, 4, steps, left)
    return steps[2:], left


#: World size and settings, by name.
GATHERED: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (2, {"training__global_batch_size": 16, "model__num_hidden_layers": 4}),
    "interleaved": (4, PIPELINE | {"parallel__schedule": "interleaved-1f1b", "model__num_hidden_layers": 8}),
}


def _gathers_and_weights(folder: Path, run: Path, kind: str) -> Any:
    changes = {**GATHERED[kind][1], "parallel__data": 2, "parallel__sharding": "optimizer"}
    with (
        mock.patch("megatron_bert.model.attention.in_parts", _never),
        mock.patch("parallel.data_parallel._GROUP_PARAMETERS", 1),
    ):
        run = run / f"gathered {kind}"
        return _gathers(folder, run, changes), _both(folder, run, changes)


@pytest.mark.parametrize("kind", GATHERED)
def test_weights_arrive_behind_the_forward_pass(together: Together, data: Path, runs: Path, kind: str) -> None:
    size = GATHERED[kind][0]
    for (steps, left), (plain, replayed) in together(size, _gathers_and_weights, data, runs, kind):
        assert plain[0] == replayed[0]
        assert torch.equal(plain[1], replayed[1])
        if size == 2:
            assert steps[-1] == [0, 1, 2, 3, 4], "once each, in the order in which they are used"
            assert left[:2] == [0, 0], "those around the layers and of the first one, before the replay begins"
            assert left[2] > left[3] > left[4] > 0, "the others one after the other, while the forward pass goes on"
        else:
            assert steps[-1]


def _resumed(folder: Path, runs: Path) -> None:
    whole = _trained(folder, runs / "whole", True, {}, save_at=2)
    (saved,) = (runs / "whole" / "checkpoints").glob("step_*")
    rest = _trained(folder, runs / "rest", True, {}, resume=saved)
    assert rest[0] == whole[0][2:]
    assert torch.equal(rest[1], whole[1])


def test_goes_on_from_a_checkpoint(together: Together, data: Path, runs: Path) -> None:
    together(1, _resumed, data, runs)


def _goes_back(folder: Path, runs: Path) -> None:
    tapes = Tapes()
    with (
        mock.patch("megatron_bert.model.attention.in_parts", _never),
        mock.patch("megatron_bert.training.graphs.CudaRecorders", return_value=tapes),
    ):
        trainer = _trainer(_settings(folder, runs / "back", True, {}), 0, 1)
        trainer.checkpoints.prepare()
        trainer.save()
        trainer.checkpoints.finish()
        (saved,) = (runs / "back" / "checkpoints").glob("step_*")
        found = []
        for _ in range(2):  # the second time, everything is replayed from the first micro batch on
            batches = trainer._batches()
            for _ in range(3):
                sums = trainer.train_step([next(batches), next(batches)])
                found.append([*sums.losses.tolist(), sums.grad_norm.item()])
            trainer.watch.check()
            trainer.resume(saved)
        assert found[:3] == found[3:]
        # A step that is computed again to be looked at runs as it is.
        before, seen, batches = [tape.replays for tape in tapes.made], [], trainer._batches()
        sums = trainer.compute_gradients([next(batches), next(batches)], lambda *place: seen.append(place))
        assert [*sums.losses.tolist(), sums.grad_norm.item()] == found[0]
        assert any(before)
        assert [tape.replays for tape in tapes.made] == before
        assert seen == [(0, 0), (0, 1)]
        trainer.close()


def test_goes_back_to_a_checkpoint_with_the_same_graph(together: Together, data: Path, runs: Path) -> None:
    together(1, _goes_back, data, runs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__packed": False}, "data.packed is false, .*: set data.packed=true, or training.cuda_graphs=false"),
        ({"training__device": "cpu"}, "training.device is cpu"),
        ({"training__recompute": "full"}, "training.recompute is full, whose attention"),
        ({"parallel__data": 2, "parallel__sharding": "full"}, "parallel.sharding is full"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_where_they_cannot_hold(data: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    given = {"data__packed": True, "training__device": "auto", "training__cuda_graphs": True, "parallel__data": None}
    settings = run_settings(data, tmp_path, **given | changes)
    with pytest.raises(UserError, match=says):
        check_settings(settings, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu(data: Path, tmp_path: Path) -> None:
    settings = run_settings(
        data, tmp_path / "run", data__packed=True, training__device="auto", training__cuda_graphs=True
    )
    with pytest.raises(UserError, match=r"this machine has no GPU: set training\.cuda_graphs=false"):
        pretrain(settings)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


#: World size and settings, by name.
WAITLESS: dict[str, tuple[int, dict[str, Any]]] = {
    "lamb": (1, {"data__packed": False, "optimizer__name": "lamb", "precision__compute": "bfloat16"}),
    "compiled": (1, {"training__compile": "all"}),
    "tensor": (2, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__sharding": "optimizer"}),
    "pipeline": (
        2,
        {"parallel__pipeline": 2, "model__num_hidden_layers": 2, "parallel__schedule": "zero-bubble-h1"},
    ),
    "full": (2, {"parallel__data": 2, "parallel__sharding": "full", "training__recompute": "full"}),
}


def _waits_for_nothing(folder: Path, run: Path, kind: str) -> None:
    torch._dynamo.reset()  # it has compiled for other settings
    changes = WAITLESS[kind][1]
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with mock.patch("megatron_bert.model.attention.in_parts", _never):
        # What would wait is among the operators that are traced, which is all that this backend runs.
        settings = _settings(folder, run / f"waits {kind}", False, changes)
        trainer = _trainer(settings, rank, size, backend="eager")
        # On a GPU it looks at a copy in page-locked memory, a step later.
        trainer.watch.check = lambda: None  # type: ignore[method-assign]
        batches = trainer._batches()
        for _ in range(2):
            step = [next(batches) for _ in range(trainer.engine.schedule.microbatches)]
            with NoWaiting():
                trainer.train_step(step)
    trainer.close()


@pytest.mark.parametrize("kind", WAITLESS)
def test_a_step_waits_for_no_device(together: Together, data: Path, runs: Path, kind: str) -> None:
    together(WAITLESS[kind][0], _waits_for_nothing, data, runs, kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of worlds are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def together(data: Path, runs: Path) -> Together:
    """Worlds for all tests: the first compilation of a process takes as long as several others."""
    return Together(
        *((size, _both_of, data, runs, kind) for kind, (size, _) in KINDS.items()),
        *((2, _sums_of, data, runs, sharding) for sharding in SHARDINGS),
        *((size, _gathers_and_weights, data, runs, kind) for kind, (size, _) in GATHERED.items()),
        (1, _resumed, data, runs),
        (1, _goes_back, data, runs),
        *((size, _waits_for_nothing, data, runs, kind) for kind, (size, _) in WAITLESS.items()),
        most=14,
    )
