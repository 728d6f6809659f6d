# SPDX-License-Identifier: Apache-2.0
"""Pretraining on a GPU: the losses of the processor, with and without compilation, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.config_sections import OptimizerSettings
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.training.optimizer import ShardedOptimizer
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.data_parallel import apply_data_parallel, finish_gradients
from parallel.gradients import clip_factor, global_gradient_norm
from parallel.mesh import ParallelLayout, ParallelMesh
from parallel.process_group import process_group
from parallel.sharding import initialize
from tests.megatron_bert.training.runs import rows, run_settings
from tests.parallel.support import ToyModel

pytestmark = pytest.mark.gpu
#: Heads of 16, the least that fused attention over packed sequences takes.
SHAPE = {"model__hidden_size": 64, "model__num_attention_heads": 4, "model__num_hidden_layers": 2}


def losses(data: Path, run: Path, **changes: Any) -> torch.Tensor:
    """Loss and gradient norm of every step: ``[steps, 2]``."""
    pretrain(run_settings(data, run, **SHAPE | changes))
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows(run) if "loss" in row], dtype=torch.float64)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_losses_of_the_processor(data: Path, tmp_path: Path, packed: bool, attention_dropout: float) -> None:
    """Hidden dropout draws the same masks; fused attention draws its own there, so those losses are only near."""
    changes = {"data__packed": packed, "model__attention_probs_dropout_prob": attention_dropout}
    here, there = (losses(data, tmp_path / kind, training__device=kind, **changes) for kind in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=0.2 if attention_dropout else 1e-4, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"training__compile": True}, {"training__recompute": "selective"}, {"parallel__sharding": "full"}],
    ids=["plain", "compiled", "recomputed", "sharded"],
)
def test_losses_in_bfloat16(data: Path, tmp_path: Path, packed: bool, changes: dict[str, Any]) -> None:
    options = {"data__packed": packed, "model__attention_probs_dropout_prob": 0.0, "training__device": "cuda"}
    exact = losses(data, tmp_path / "float32", **options)
    rounded = losses(data, tmp_path / "bfloat16", precision__compute="bfloat16", **options, **changes)
    # Eight bits, in a sum of some hundred terms whose errors differ in sign.
    torch.testing.assert_close(rounded, exact, rtol=2**-6, atol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_dropout_of_packed_attention(data: Path, tmp_path: Path, compiled: bool) -> None:
    changes = {"data__packed": True, "model__attention_probs_dropout_prob": 0.1}
    here = losses(data, tmp_path / "cpu", training__device="cpu", **changes)
    changes |= {"training__device": "cuda", "precision__compute": "bfloat16", "training__compile": compiled}
    torch.testing.assert_close(losses(data, tmp_path / "cuda", **changes), here, rtol=0.2, atol=0)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_goes_on(data: Path, tmp_path: Path, compute: str) -> None:
    """With the dropout masks that the rest of the run would have drawn; sums of embeddings' gradients vary in order."""
    options = {"training__device": "cuda", "precision__compute": compute, "data__packed": True}
    options |= {"checkpoint__every": 3, "checkpoint__keep": 0}
    whole = losses(data, tmp_path / "whole", **options)
    middle = tmp_path / "whole" / "checkpoints" / "step_00000003"
    rest = losses(data, tmp_path / "rest", checkpoint__resume=str(middle), **options)
    torch.testing.assert_close(rest, whole[3:], rtol=1e-5 if compute == "float32" else 2**-8, atol=0)


def updated(device: str, name: str) -> dict[str, torch.Tensor]:
    """Master weights after two steps, in which the host asks the device for nothing once gradients are there."""
    ids = torch.arange(8, device=device)
    with process_group(device) as world:
        mesh = ParallelMesh(ParallelLayout(), world.device)
        model = ToyModel().to(world.device)
        initialize(model, 5)
        apply_data_parallel(model, model.units(), mesh, sharding="none", compute_dtype=torch.bfloat16)
        parameters = dict(model.named_parameters())
        optimizer = ShardedOptimizer(parameters, OptimizerSettings(name=name, eps=0.1), mesh, stages=[model])
        for _ in range(2):
            model(ids).float().square().sum().backward()
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            finish_gradients(model)
            norm = global_gradient_norm(optimizer.gradients(mesh), mesh)
            optimizer.step(0.01, (~norm.isfinite()).float(), clip_factor(norm, 1.0))
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("default")
        return {key: optimizer.weights(parameter).values.cpu() for key, parameter in parameters.items()}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_wait_for_nothing(name: str) -> None:
    here, there = (updated(device, name) for device in ("cpu", "cuda"))
    for key, weight in here.items():
        # Two steps of about 0.01, the gradients of which are off by bfloat16's rounding.
        torch.testing.assert_close(there[key], weight, rtol=0, atol=1e-3, msg=key)


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True, "all"])
def test_replayed_graphs(data: Path, tmp_path: Path, compiled: bool | str, attention_dropout: float) -> None:
    """Losses to the last bit, dropout on, where a run repeats its own; some gradients add up in any order."""
    options = {"data__packed": True, "precision__compute": "bfloat16", "training__device": "cuda"}
    options |= {"model__attention_probs_dropout_prob": attention_dropout, "training__compile": compiled}
    plain, again = (losses(data, tmp_path / name, **options) for name in ("plain", "again"))
    replayed = losses(data, tmp_path / "replayed", training__cuda_graphs=True, **options)
    if torch.equal(plain, again):
        assert torch.equal(replayed, plain)
    torch.testing.assert_close(replayed, plain, rtol=2**-8, atol=0)


@pytest.mark.parametrize("changes", [{"training__compile": "all"}, {"training__cuda_graphs": True}], ids=str)
def test_everything_compiled_and_graphs_go_on(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    options = {"training__device": "cuda", "precision__compute": "bfloat16", "data__packed": True, **changes}
    options |= {"checkpoint__every": 3, "checkpoint__keep": 0}
    whole = losses(data, tmp_path / "whole", **options)
    middle = tmp_path / "whole" / "checkpoints" / "step_00000003"
    rest = losses(data, tmp_path / "rest", checkpoint__resume=str(middle), **options)
    torch.testing.assert_close(rest, whole[3:], rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"training__compile": "all"}, {"training__cuda_graphs": True}, {"optimizer__name": "lamb"}],
    ids=["plain", "compiled", "graphs", "lamb"],
)
def test_steps_wait_for_nothing(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Once what is compiled and recorded is there."""
    options = SHAPE | {"data__packed": True, "precision__compute": "bfloat16", "training__device": "cuda"}
    settings = run_settings(data, tmp_path, **options | changes)
    with process_group("cuda") as world:
        mesh = ParallelMesh(settings.layout(1), world.device)
        objective = Pretraining(settings, load_tokenizer(settings.tokenizer.path))
        objective.prepare(mesh, world)
        trainer = Trainer(settings, objective, mesh, world, None)
        batches = trainer._batches()
        steps = [[next(batches) for _ in range(trainer.engine.schedule.microbatches)] for _ in range(6)]
        for number, step in enumerate(steps):
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            try:
                with trainer.memory.measuring():
                    trainer.train_step(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        parts = trainer.memory.parts
        assert all(parts[part] > 0 for part in ("weights", "gradients", "optimizer", "peak"))
        assert sum(size for part, size in parts.items() if part != "peak") == parts["peak"]
        trainer.close()
