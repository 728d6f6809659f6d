# SPDX-License-Identifier: Apache-2.0
"""Weight gradients left to a queue are those that the normal backward pass computes, in every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.data_parallel import (
    apply_data_parallel,
    finish_gradients,
    keep_gradients,
    reduce_gradients,
    set_gradient_sync,
)
from parallel.dropout import fold_in
from parallel.gradients import sum_token_partial_gradients
from parallel.layers import column_parallel_linear
from parallel.mesh import SINGLE, ParallelMesh, TensorParallel
from parallel.recompute import Recompute
from parallel.sharding import initialize
from parallel.weight_gradients import WeightGradientQueue, active_queue, deferring
from tests.parallel.support import Operators, ToyModel, full_gradients
from tests.worlds import Together, make_mesh, run_world

#: Tokens of each micro batch, different numbers of them; even, so that two tensor ranks can divide them.
BATCHES = [
    torch.randint(0, ToyModel.VOCABULARY, (count,), generator=torch.Generator().manual_seed(count))
    for count in (8, 12, 4, 10, 6, 8, 14, 2)
]


class TiedModel(ToyModel):
    """Layers between an embedding and a head that shares its matrix, divided by vocabulary."""

    def __init__(self, *, tp: TensorParallel = SINGLE, recompute: Recompute = "none") -> None:
        super().__init__(tp=tp, recompute=recompute)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for number, layer in enumerate(self.layers):
            hidden = hidden + layer(hidden, fold_in(ids, number))
        logits = column_parallel_linear(hidden, self.embedding.weight, None, self.tp, self.tp.sequence)
        return vocab_parallel_cross_entropy(logits, ids, self.VOCABULARY, self.tp).sum()

    def units(self) -> Iterator[nn.Module]:
        return iter(self.layers)


def _build(mesh: ParallelMesh, sharding: str, dtype: torch.dtype, recompute: Recompute) -> TiedModel:
    model = TiedModel(tp=mesh.tensor_parallel, recompute=recompute)
    initialize(model, 5)
    apply_data_parallel(model, model.units(), mesh, sharding=sharding, compute_dtype=dtype)
    return model


def _own(mesh: ParallelMesh) -> list[Tensor]:
    """Three micro batches: the fewest where queues that run late run in another order than those that do not."""
    return BATCHES[mesh.data_rank : 3 * mesh.layout.data : mesh.layout.data]


def _normal(model: TiedModel, mesh: ParallelMesh) -> dict[str, Tensor]:
    batches = _own(mesh)
    for number, ids in enumerate(batches):
        set_gradient_sync(model, last=number == len(batches) - 1)
        model(ids).backward()
    finish_gradients(model)
    sum_token_partial_gradients(model, mesh.tensor_parallel)
    return full_gradients(model)


def _deferred(model: TiedModel, mesh: ParallelMesh, late: bool) -> dict[str, Tensor]:
    """As the engine does it: each queue runs after the next backward pass, or all of them at the very end."""
    waiting: list[WeightGradientQueue] = []

    def run_oldest() -> None:
        waiting.pop(0).run()
        keep_gradients(model)

    set_gradient_sync(model, last=False)
    for ids in _own(mesh):
        queue = WeightGradientQueue()
        with deferring(queue):
            loss = model(ids)
        assert active_queue() is None
        with deferring(queue):
            loss.backward()
        waiting.append(queue)
        if not late and len(waiting) > 1:
            run_oldest()
    while waiting:
        run_oldest()
    reduce_gradients(model)
    finish_gradients(model)
    sum_token_partial_gradients(model, mesh.tensor_parallel)
    return full_gradients(model)


def _every_recomputation(tensor: int, sequence: bool, data: int, sharding: str, dtype: torch.dtype) -> None:
    shard = {"none": 1, "hybrid": 2}.get(sharding, data)
    mesh = make_mesh(tensor=tensor, data=data, data_shard=shard, sequence=sequence)
    expected = _normal(_build(mesh, sharding, dtype, "none"), mesh)  # recomputation may change no bit
    for recompute, late in product(("none", "selective", "full"), (False, True)):
        gradients = _deferred(_build(mesh, sharding, dtype, recompute), mesh, late)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            # The same products of the same numbers: what differs is the order of float32 sums inside a product, and
            # in bfloat16 the rounding of a few of its results. Sums over micro batches are float32 in both.
            eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 16 * torch.finfo(torch.float32).eps
            off = ((gradient - expected[name]).norm() / expected[name].norm()).item()
            assert off < eps, (name, recompute, late, off, eps)


#: tensor, sequence, data, sharding
LAYOUTS = [
    (1, False, 1, "none"),
    (2, False, 1, "none"),
    (2, True, 1, "none"),
    *((2, True, 2, sharding) for sharding in ("none", "optimizer", "full")),
    (1, False, 4, "hybrid"),
]
#: What rounds to bfloat16 depends on who keeps the parameters: each of them once, on the fewest ranks.
ROUNDED = [(1, False, 1, "none"), (2, True, 1, "none"), (1, False, 2, "optimizer"), (1, False, 2, "full")]
CASES = [(layout, torch.float32) for layout in LAYOUTS] + [(layout, torch.bfloat16) for layout in ROUNDED]
WORLDS = Together(*((layout[0] * layout[2], _every_recomputation, *layout, dtype) for layout, dtype in CASES))


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_every_layout(layout, dtype):
    WORLDS(layout[0] * layout[2], _every_recomputation, *layout, dtype)


def _products() -> tuple[int, int, int, int]:
    """Matrix products of a normal step; of forward, first half and second half of a deferred one."""
    mesh = make_mesh(tensor=2, sequence=True)

    def count(operators: Operators) -> int:
        return operators.count("mm", "addmm", "bmm")

    model = _build(mesh, "none", torch.float32, "none")
    with Operators() as normal:
        model(BATCHES[0]).backward()
    queue = WeightGradientQueue()
    with deferring(queue), Operators() as forward:
        loss = model(BATCHES[0])
    with deferring(queue), Operators() as first:
        loss.backward()
    with Operators() as second:
        queue.run()
    queue.run()  # it forgot its work
    return count(normal), count(forward), count(first), count(second)


def test_every_product_runs_once_and_in_its_half():
    products = 2 * 2 + 1  # column and row of each layer, and the head
    assert run_world(2, _products) == [(3 * products, products, products, products)] * 2


def test_nothing_waits_where_no_gradient_is_asked_for():
    model = TiedModel()
    initialize(model, 5)
    queue = WeightGradientQueue()
    with deferring(queue), torch.no_grad():
        model(BATCHES[0])
    assert queue._work == []


def _fail_under(queue: WeightGradientQueue) -> None:
    assert active_queue() is queue
    raise ValueError("inside")


def test_queues_nest_and_end():
    one, other = WeightGradientQueue(), WeightGradientQueue()
    with deferring(one):
        assert active_queue() is one
        with pytest.raises(ValueError, match="inside"), deferring(other):
            _fail_under(other)
        assert active_queue() is one
        with deferring(None):
            assert active_queue() is None
    assert active_queue() is None


def test_a_plain_linear_layer_keeps_its_gradients_in_autograd():
    weight = torch.ones(2, 3, requires_grad=True)
    with deferring(WeightGradientQueue()):
        F.linear(torch.ones(1, 3), weight).sum().backward()
    assert weight.grad is not None
