# SPDX-License-Identifier: Apache-2.0
"""Divided layers against torch's own, in float64: outputs and every gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import copy_to_ranks
from parallel.errors import UserError
from parallel.gradients import sum_token_partial_gradients
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    select_tokens,
)
from parallel.mesh import SINGLE, TensorParallel
from parallel.sharding import local_tensor
from tests.parallel.support import Operators, assert_sums_equal, own_share, uniform
from tests.worlds import Together, make_tensor_parallel, run_world

T, K, N = 8, 12, 16  # tokens, input features, output features
TERMS = max(T, K, N)  # no output or gradient sums more products, each of numbers within [-1, 1]
SEQUENCE = pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


def _fill(parameter: Tensor, values: Tensor, tp: TensorParallel, dim: int) -> None:
    with torch.no_grad():
        local_tensor(parameter).copy_(own_share(values, tp, dim))


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of torch's linear layer and the gradients of its input, weight and bias."""
    leaves = {"input": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    output = F.linear(leaves["input"], leaves["weight"], leaves.get("bias"))
    output.backward(gradient)
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _own_input(x: Tensor, tp: TensorParallel) -> Tensor:
    return (own_share(x, tp) if tp.sequence else x.clone()).requires_grad_()


def _column(sequence: bool, with_bias: bool) -> None:
    tp = make_tensor_parallel(sequence=sequence)
    x, weight, gradient = uniform(T, K, seed=1), uniform(N, K, seed=2), uniform(T, N, seed=3)
    bias = uniform(N, seed=4) if with_bias else None
    expected, gradients = _reference(x, weight, bias, gradient)
    layer = ColumnParallelLinear(K, N, with_bias, init_std=1.0, tp=tp, dtype=torch.float64)
    _fill(layer.weight, weight, tp, 0)
    if bias is not None:
        _fill(layer.bias, bias, tp, 0)
    own = _own_input(x, tp)
    output = layer(own)
    assert_sums_equal(output.detach(), own_share(expected, tp, 1), TERMS)
    output.backward(own_share(gradient, tp, 1))
    input_gradient = gradients["input"]
    assert_sums_equal(own.grad, own_share(input_gradient, tp) if tp.sequence else input_gradient, TERMS)
    assert_sums_equal(local_tensor(layer.weight.grad), own_share(gradients["weight"], tp), TERMS)
    if with_bias:
        assert_sums_equal(local_tensor(layer.bias.grad), own_share(gradients["bias"], tp), TERMS)


COLUMNS = Together(*product((1, 2, 4), (_column,), (False, True), (False, True)))


@pytest.mark.parametrize("with_bias", [False, True], ids=["nobias", "bias"])
@SEQUENCE
@SIZES
def test_column_parallel_linear(size, sequence, with_bias):
    COLUMNS(size, _column, sequence, with_bias)


def _row(sequence: bool, with_bias: bool) -> None:
    tp = make_tensor_parallel(sequence=sequence)
    x, weight, gradient = uniform(T, K, seed=1), uniform(N, K, seed=2), uniform(T, N, seed=3)
    bias = uniform(N, seed=4) if with_bias else None
    expected, gradients = _reference(x, weight, bias, gradient)
    layer = RowParallelLinear(K, N, with_bias, init_std=1.0, tp=tp, dtype=torch.float64)
    _fill(layer.weight, weight, tp, 1)
    if bias is not None:
        with torch.no_grad():
            layer.bias.copy_(bias)
    own = own_share(x, tp, 1).requires_grad_()
    output = layer(own)
    shown = (lambda whole: own_share(whole, tp)) if tp.sequence else (lambda whole: whole)
    assert_sums_equal(output.detach(), shown(expected), TERMS)
    output.backward(shown(gradient))
    assert_sums_equal(own.grad, own_share(gradients["input"], tp, 1), TERMS)
    assert_sums_equal(local_tensor(layer.weight.grad), own_share(gradients["weight"], tp, 1), TERMS)
    if with_bias:
        if tp.sequence:  # partial until the end of the step
            assert_sums_equal(layer.bias.grad, own_share(gradient, tp).sum(0), TERMS)
        sum_token_partial_gradients(layer, tp)
        assert_sums_equal(layer.bias.grad, gradients["bias"], TERMS)


def _tied_gradient(tied: bool, held: bool) -> tuple[Tensor, int]:
    """The gradient of a table that is looked up and multiplied with, and how often one of its size was made."""
    table = VocabParallelEmbedding(40, 40, 8, init_std=0.1)
    table.weight.data = uniform(40, 8, seed=1)
    table.tied = tied
    if held:
        table.weight.grad = uniform(40, 8, seed=2)
    ids = torch.tensor([3, 7, 3, 0, 39])
    loss = (F.linear(table(ids).tanh(), table.weight) * uniform(5, 40, seed=3)).sum()
    with Operators() as operators:
        loss.backward()
    assert table.weight.grad is not None
    return table.weight.grad, operators.count("embedding_dense_backward")


@pytest.mark.parametrize("held", [False, True])
def test_a_tied_embedding_adds_its_rows_to_the_gradient_that_is_there(held):
    (expected, whole), (actual, made) = (_tied_gradient(tied, held) for tied in (False, True))
    torch.testing.assert_close(actual, expected)
    assert (whole, made) == (1, 0 if held else 1)


ROWS = Together(*product((1, 2, 4), (_row,), (False, True), (False, True)))


@pytest.mark.parametrize("with_bias", [False, True], ids=["nobias", "bias"])
@SEQUENCE
@SIZES
def test_row_parallel_linear(size, sequence, with_bias):
    ROWS(size, _row, sequence, with_bias)


def _three_dimensional() -> None:
    """Leading dimensions other than tokens are flattened for the weight's gradient."""
    tp = make_tensor_parallel()
    x, weight, gradient = uniform(2, 4, K, seed=1), uniform(N, K, seed=2), uniform(2, 4, N, seed=3)
    expected, gradients = _reference(x, weight, None, gradient)
    own, own_weight = x.clone().requires_grad_(), own_share(weight, tp).requires_grad_()
    output = column_parallel_linear(own, own_weight, None, tp, sequence=False)
    assert_sums_equal(output.detach(), own_share(expected, tp, 2), TERMS)
    output.backward(own_share(gradient, tp, 2))
    assert_sums_equal(own.grad, gradients["input"], TERMS)
    assert_sums_equal(own_weight.grad, own_share(gradients["weight"], tp), TERMS)


def test_column_parallel_linear_of_a_batch():
    run_world(2, _three_dimensional)


def _frozen(sequence: bool) -> None:
    """Only the gradients asked for are computed, and only their collectives run."""
    tp = make_tensor_parallel(sequence=sequence)
    x, weight = uniform(T, K, seed=1), uniform(N, K, seed=2)
    gradient = own_share(uniform(T, N, seed=3), tp, 1)
    own, own_weight = _own_input(x, tp), own_share(weight, tp)
    output = column_parallel_linear(own, own_weight, None, tp, sequence)
    with Operators() as backward:
        output.backward(gradient)
    assert backward.count("mm") == 1
    assert backward.count("all_gather_into_tensor") == 0
    own, own_weight = own.detach(), own_weight.requires_grad_()
    output = column_parallel_linear(own, own_weight, None, tp, sequence)
    with Operators() as backward:
        output.backward(gradient)
    assert backward.count("mm") == 1
    assert backward.count("all_reduce", "reduce_scatter_tensor") == 0


@SEQUENCE
def test_frozen_inputs_and_weights_cost_nothing(sequence):
    run_world(2, _frozen, sequence)


IDS = torch.tensor([0, 10, 3, 3, 8, 5, 4, 7])  # both ends of shards of 4 and 8 rows


def _embedding(sequence: bool) -> None:
    tp = make_tensor_parallel(sequence=sequence)
    vocabulary, padded = 11, 16  # at 4 ranks the last holds padding only
    table, gradient = uniform(padded, N, seed=1), uniform(T, N, seed=2)
    whole = table.clone().requires_grad_()
    F.embedding(IDS, whole).backward(gradient)
    layer = VocabParallelEmbedding(vocabulary, padded, N, init_std=1.0, tp=tp, dtype=torch.float64)
    _fill(layer.weight, table, tp, 0)
    output = layer(IDS)
    shown = (lambda rows: own_share(rows, tp)) if tp.sequence else (lambda rows: rows)
    # One rank gives the row and the others zeros: exact.
    torch.testing.assert_close(output.detach(), shown(table[IDS]), rtol=0, atol=0)
    output.backward(shown(gradient))
    assert_sums_equal(local_tensor(layer.weight.grad), own_share(whole.grad, tp), T)


@SEQUENCE
@SIZES
def test_vocab_parallel_embedding(size, sequence):
    run_world(size, _embedding, sequence)


INDEX = torch.tensor([0, 7, 3, 0, 4])


def _select(sequence: bool) -> None:
    tp = make_tensor_parallel(sequence=sequence)
    hidden, gradient = uniform(T, K, seed=1), uniform(len(INDEX), K, seed=2)
    whole = hidden.clone().requires_grad_()
    whole[INDEX].backward(gradient)
    own = _own_input(hidden, tp)
    rows = select_tokens(own, INDEX, tp)
    torch.testing.assert_close(rows.detach(), hidden[INDEX], rtol=0, atol=0)
    rows.backward(gradient)
    assert_sums_equal(own.grad, own_share(whole.grad, tp) if tp.sequence else whole.grad, T)


@SEQUENCE
@SIZES
def test_select_tokens(size, sequence):
    run_world(size, _select, sequence)


def _order_of_backward(sequence: bool) -> list[str]:
    tp = make_tensor_parallel(sequence=sequence)
    own = _own_input(uniform(T, K, seed=1), tp)
    weight = own_share(uniform(N, K, seed=2), tp).requires_grad_()
    output = column_parallel_linear(own, weight, None, tp, sequence)
    with Operators() as backward:
        output.backward(own_share(uniform(T, N, seed=3), tp, 1))
    communication = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor")
    return [name for name in backward.names if name in (*communication, "mm")]


def test_column_backward_overlaps_the_sum_with_the_weight_gradient():
    # The first product is the input gradient's. Its sum is under way while the second, the weight gradient's, runs.
    for order in run_world(2, _order_of_backward, False):
        assert order == ["mm", "all_reduce", "mm", "wait_tensor"]


def test_column_backward_overlaps_both_collectives_under_sequence_parallelism():
    expected = [
        "all_gather_into_tensor",  # of the input, behind the input gradient's product
        "mm",
        "reduce_scatter_tensor",  # of the input gradient, behind the weight gradient's product
        "wait_tensor",
        "mm",
        "wait_tensor",
    ]
    for order in run_world(2, _order_of_backward, True):
        assert order == expected


def _bytes_saved_by_column(sequence: bool) -> int:
    tp = make_tensor_parallel(sequence=sequence)
    own = _own_input(uniform(T, K, seed=1), tp)
    weight = own_share(uniform(N, K, seed=2), tp).requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        column_parallel_linear(own, weight, None, tp, sequence)
    return sum(saved) - weight.nbytes


def test_column_keeps_only_its_own_tokens_under_sequence_parallelism():
    whole = T * K * 8
    assert run_world(2, _bytes_saved_by_column, False) == [whole, whole]
    assert run_world(2, _bytes_saved_by_column, True) == [whole // 2, whole // 2]


def _indivisible() -> None:
    tp = make_tensor_parallel()
    with pytest.raises(UserError, match=r"output features is 9, which a tensor-parallel size of 2 .*: choose"):
        ColumnParallelLinear(4, 9, init_std=1.0, tp=tp)
    with pytest.raises(UserError, match=r"input features is 9, which a tensor-parallel size of 2 .*: choose"):
        RowParallelLinear(9, 4, init_std=1.0, tp=tp)
    with pytest.raises(UserError, match=r"padded vocabulary is 9, which a tensor-parallel size of 2 .*: choose"):
        VocabParallelEmbedding(7, 9, 4, init_std=1.0, tp=tp)


def test_sizes_that_do_not_divide_are_named():
    run_world(2, _indivisible)


def _shown() -> list[str]:
    tp = make_tensor_parallel()
    column = ColumnParallelLinear(4, 6, init_std=1.0, tp=tp)
    assert tuple(column.weight.shape) == (6, 4)
    assert tuple(local_tensor(column.weight).shape) == (3, 4)
    row = RowParallelLinear(4, 6, bias=False, init_std=1.0, tp=tp)
    assert tuple(row.weight.shape) == (6, 4)
    assert tuple(local_tensor(row.weight).shape) == (6, 2)
    return [repr(column), repr(row), repr(VocabParallelEmbedding(5, 6, 4, init_std=1.0, tp=tp))]


def test_layers_show_global_sizes_and_their_rank():
    column, row, embedding = run_world(2, _shown)[1]
    assert "in_features=4, out_features=6, bias=True, tensor_rank=1/2" in column
    assert "in_features=4, out_features=6, bias=False, tensor_rank=1/2" in row
    assert "vocab_size=5, padded=6, embedding_dim=4, tensor_rank=1/2" in embedding


def test_parameters_of_an_undivided_layer_are_plain():
    assert type(ColumnParallelLinear(4, 6, init_std=1.0).weight) is torch.nn.Parameter
    assert not dist.is_initialized()
    assert copy_to_ranks(torch.ones(1), SINGLE) is not None
