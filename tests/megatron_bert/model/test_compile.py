# SPDX-License-Identifier: Apache-2.0
"""A compiled layer is one graph, the same for all layers, and gives the eager result."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager, eager

from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.batch import token_keys
from megatron_bert.model.encoder import Encoder
from parallel.data_parallel import apply_data_parallel
from parallel.gradients import sum_token_partial_gradients
from parallel.mesh import SINGLE, Sharding, TensorParallel
from parallel.sharding import initialize
from tests.megatron_bert.model.support import CONFIG, assert_steps_equal, make_batch, make_rows, whole
from tests.worlds import make_mesh, make_tensor_parallel, preload_compiler, run_world

preload_compiler()


class CountingBackend:
    """A backend that counts the graphs it is given."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.graphs, self.inner = 0, inner

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return self.inner(graph, inputs)


def _compile(encoder: Encoder, inner: Callable[..., Any] = aot_eager) -> CountingBackend:
    """Compile the layers the way training does, but for the backend."""
    backend, compile_ = CountingBackend(inner), torch.compile

    def with_backend(function: Any, **settings: Any) -> Any:
        assert settings.get("fullgraph") is True
        return compile_(function, **settings, backend=backend)

    with mock.patch("torch.compile", with_backend):
        for layer in encoder.layers.values():
            layer.compile_forward()
    return backend


def _step(
    encoder: nn.Module,
    tp: TensorParallel,
    rows: bool,
    dropout: bool,
    dtype: torch.dtype = torch.float32,
    swapped: bool = False,
) -> dict[str, Tensor]:
    batch = make_rows(swapped=swapped) if rows else make_batch()
    total = len(batch.tokens)
    x = torch.randn(total, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    x = (x.chunk(tp.size)[tp.rank] if tp.sequence else x).to(dtype, copy=True).requires_grad_()
    out = encoder(x, batch.layout, token_keys(batch.samples, batch.positions, 5) if dropout else None)
    (out * torch.linspace(-1, 1, CONFIG.hidden_size)).square().sum().backward()
    sum_token_partial_gradients(encoder, tp)
    results = {name: whole(parameter.grad) for name, parameter in encoder.named_parameters()}
    return results | {"out": out.detach().clone(), "x": x.grad.clone()}


def _encoder(tp: TensorParallel, recompute: str = "none", act: str = CONFIG.hidden_act) -> Encoder:
    encoder = Encoder(replace(CONFIG, hidden_act=act), tp=tp, recompute=recompute)
    initialize(encoder, 3)
    return encoder


def _compiled(
    tp: TensorParallel,
    rows: bool,
    dropout: bool,
    recompute: str,
    act: str = CONFIG.hidden_act,
    inner: Callable[..., Any] = aot_eager,
) -> int:
    """Graphs that one training step of all layers took, after a check of its results."""
    expected = _step(_encoder(tp, recompute, act), tp, rows, dropout)
    torch._dynamo.reset()
    encoder = _encoder(tp, recompute, act)
    backend = _compile(encoder, inner)
    # The traced operators are the eager ones; decompositions add up in another order: float32 rounding.
    assert_steps_equal(_step(encoder, tp, rows, dropout), expected, 1e-5)
    if rows:  # what is in the rows changes nothing
        other = _step(_encoder(tp, recompute, act), tp, rows, dropout, swapped=True)
        encoder.zero_grad()
        assert_steps_equal(_step(encoder, tp, rows, dropout, swapped=True), other, 1e-5)
    return backend.graphs


def _prepared(sharding: Sharding, **layout: Any) -> int:
    """The same in bfloat16, with its parameters prepared for data parallelism."""
    mesh = make_mesh(**layout)
    tp = mesh.tensor_parallel
    torch._dynamo.reset()
    results, graphs = [], 0
    for compiled in (False, True):
        encoder = _encoder(tp)
        backend = _compile(encoder) if compiled else None
        layers = list(encoder.layers.values())
        apply_data_parallel(encoder, layers, mesh, sharding=sharding, compute_dtype=torch.bfloat16)
        results.append(_step(encoder, tp, False, True, torch.bfloat16))
        graphs += backend.graphs if backend else 0
    # A rounding here or there in another order: a few bfloat16 steps of the largest element.
    assert_steps_equal(results[1], results[0], 4 * torch.finfo(torch.bfloat16).eps)
    return graphs


#: sequence parallel, rows, dropout, recompute, and whether torch differentiates the graph: that takes as long again,
#: and operators that it differentiates in one case are left as they were traced in others
CASES = {
    "plain": (False, False, True, "none", False),
    "sequence": (True, False, False, "none", False),
    "sequence-rows-dropout": (True, True, True, "none", True),
    "selective": (True, False, True, "selective", False),
    "full": (True, False, True, "full", True),
}


def _all_cases() -> dict[str, int | str]:
    # In one world, because what torch.compile loads on its first use takes longer than all cases together.
    graphs: dict[str, int | str] = {}
    for name, (sequence, rows, dropout, recompute, differentiated) in CASES.items():
        inner = aot_eager if differentiated else eager
        try:
            graphs[name] = _compiled(make_tensor_parallel(sequence=sequence), rows, dropout, recompute, inner=inner)
        except Exception:
            graphs[name] = traceback.format_exc()
    return graphs | {
        "flat-buffers": _prepared("none", tensor=2),
        "fully-sharded": _prepared("full", data=2, data_shard=2),
    }


@pytest.fixture(scope="module")
def graphs() -> list[dict[str, int | str]]:
    return run_world(2, _all_cases, timeout=240)


@pytest.mark.parametrize("case", [*CASES, "flat-buffers", "fully-sharded"])
def test_divided_layers_share_one_graph_and_give_the_eager_result(case, graphs):
    assert [of_rank[case] for of_rank in graphs] == [1, 1]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_undivided_layers_share_one_graph_and_give_the_eager_result(act):
    # What torch traces of a layer differs by its activation alone: it is differentiated with one of them.
    inner = aot_eager if act == CONFIG.hidden_act else eager
    assert _compiled(SINGLE, False, True, "none", act, inner) == 1
