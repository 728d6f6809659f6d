# SPDX-License-Identifier: Apache-2.0
"""What a step computes in place on a processor, and what it leaves out, changes no loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.model import attention_in_place as module
from megatron_bert.model.attention_functions import explicit_attention
from megatron_bert.model.attention_in_place import attention_in_place
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.trainer import Trainer
from parallel.dropout import fold_in
from parallel.mesh import ParallelMesh
from parallel.process_group import World
from parallel.sharding import local_tensor
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings
from tests.worlds import CPU, run_world

B, S, A, D = 3, 8, 2, 4
SAMPLES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
MASKS = {
    "all": None,
    "padded": torch.arange(S) < torch.tensor([[8], [3], [0]]),  # one without any key
    "rows": (SAMPLES[:, None] == SAMPLES).expand(B, 1, S, S),
}


@pytest.mark.parametrize("at_once", [1, S * S, 2 * S * S, 5 * S * S, 1 << 20])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("positioned", [False, True])
def test_attention(monkeypatch: pytest.MonkeyPatch, at_once: int, mask: str, positioned: bool) -> None:
    """However many heads are computed at once."""
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    projected, gradient = torch.randn(B, S, A, 3, D), torch.randn(B, S, A, D)
    keys = fold_in(torch.arange(B * A * S).view(B, A, S), 1)
    positions = torch.arange(S, dtype=torch.int32).flip(0).expand(B, S) if positioned else None
    leaf, other = (projected.clone().requires_grad_() for _ in range(2))
    found = attention_in_place(leaf, MASKS[mask], 0.25, keys, positions)
    query, key, value = (part.transpose(1, 2) for part in other.unbind(3))
    if positioned:  # keys in another order, which dropout knows by their numbers
        turned = None if MASKS[mask] is None else MASKS[mask].flip(-1)
        expected = explicit_attention(query, key.flip(2), value.flip(2), turned, 0.25, keys)
    else:
        expected = explicit_attention(query, key, value, MASKS[mask], 0.25, keys)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    found.backward(gradient)
    expected.backward(gradient.transpose(1, 2))
    torch.testing.assert_close(leaf.grad, other.grad)


def test_a_second_derivative_of_attention_is_refused() -> None:
    """What it would be made of is gone."""
    projected = torch.randn(1, 2, 1, 3, D, requires_grad=True)
    context = attention_in_place(projected, None, 0.1, torch.arange(2).view(1, 1, 2), None)
    (gradient,) = torch.autograd.grad(context.square().sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@contextmanager
def _as_elsewhere() -> Iterator[None]:
    with (
        mock.patch.object(Trainer, "compute_gradients", Trainer.compute_gradients.__wrapped__),
        mock.patch("megatron_bert.model.layer.TransformerLayer.selects", return_value=False),
    ):
        yield


def _steps(folder: Path, changes: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Losses and gradient norms of three steps, the weights after them, and how often attention was in place."""
    settings = run_settings(folder, folder / "run", **changes)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = ParallelMesh(settings.layout(size), CPU)
    objective = Pretraining(settings, load_tokenizer(settings.tokenizer.path))
    trainer = Trainer(settings, objective, mesh, World(rank=rank, size=size, local_rank=rank, device=CPU), None)
    batches, found = trainer._batches(), []
    with mock.patch("megatron_bert.model.attention.attention_in_place", wraps=attention_in_place) as called:
        for _ in range(3):
            sums = trainer.train_step([next(batches) for _ in range(trainer.engine.schedule.microbatches)])
            found.append([*sums.losses.tolist(), sums.grad_norm.item()])
    for buffers in trainer.optimizer.buffers:
        buffers.wait()
    weights = [local_tensor(parameter).detach().flatten() for parameter in trainer.parameters.values()]
    trainer.close()
    return torch.tensor(found), torch.cat(weights) if weights else torch.zeros(0), called.call_count


def _both(folder: Path, changes: dict[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
    found = [_steps(folder, changes)]
    with _as_elsewhere():
        found.append(_steps(folder, changes))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_place")
    make_data(folder)
    return folder


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (1, {"data__packed": True, "training__recompute": "selective"}),
        (1, {"training__recompute": "full"}),
        (2, {"parallel__data": 2, "parallel__sharding": "optimizer"}),
        (2, {"parallel__pipeline": 2, "parallel__data": None, "parallel__schedule": "zero-bubble-h1"}),
        (2, {"parallel__data": 2, "parallel__sharding": "full"}),
    ],
    ids=["plain", "packed", "full", "data", "pipeline", "sharded"],
)
def test_losses_norms_and_weights(data: Path, size: int, changes: dict[str, Any]) -> None:
    """With dropout, over micro batches that add up."""
    changes = {"model__num_hidden_layers": 2} | changes
    for (losses, weights, count), (others, other_weights, none) in run_world(size, partial(_both, data), changes):
        assert count > none == 0
        torch.testing.assert_close(losses, others)
        # Adam divides small gradients by their size, so that their rounding moves a weight as far as they do.
        torch.testing.assert_close(weights, other_weights, rtol=1e-4, atol=1e-5)
