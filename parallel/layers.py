# SPDX-License-Identifier: Apache-2.0
"""Linear and embedding layers divided over tensor-parallel ranks (Shoeybi et al., arXiv 1909.08053, section 3).

Shapes: T tokens, t tensor-parallel size, V vocabulary, K features in, N features out. Under sequence parallelism the
tokens between the layers are divided by rank (T/t), and the copies and sums below become gathers and scatters over
tokens. Weights keep torch's ``[out, in]`` order; names and shapes in checkpoints are those of the undivided layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import (
    all_gather_tokens,
    copy_to_ranks,
    reduce_from_ranks,
    reduce_scatter_tokens,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from parallel.mesh import SINGLE, TensorParallel
from parallel.sharding import Constant, Normal, ParallelModule, local_size, local_tensor, sharded_parameter
from parallel.simulated_device import on_gpu
from parallel.weight_gradients import active_queue, adds_in_place, deferred_linear, linear


class _ColumnLinear(torch.autograd.Function):
    """``y = x W^T + b`` with W divided by rows over the ranks.

    | tensor | plain   | sequence parallel |
    |--------|---------|-------------------|
    | x      | [T, K]  | [T/t, K]          |
    | W, b   | [N/t, K], [N/t] | same      |
    | y      | [T, N/t] | [T, N/t]         |

    forward: (all-gather x over tokens), GEMM. Backward: the input gradient's sum over ranks (all-reduce, or
    reduce-scatter over tokens) runs while the weight gradient's GEMM computes; under sequence parallelism x is
    gathered again, behind the input gradient's GEMM, so that only its own share was kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool, size: int, group_name: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = (sequence, size, group_name)
        ctx.has_bias = bias is not None
        full = wait(start_all_gather(x, size, group_name)) if sequence else x
        return F.linear(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        sequence, size, group_name = ctx.place
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        gathering = start_all_gather(x, size, group_name) if sequence and needs_weight else None
        summing = None
        if needs_input:
            partial = gradient @ weight
            summing = (
                start_reduce_scatter(partial, size, group_name) if sequence else start_all_reduce(partial, group_name)
            )
        weight_gradient = bias_gradient = None
        if needs_weight:
            full = x if gathering is None else wait(gathering)
            weight_gradient = gradient.flatten(0, -2).t() @ full.flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias_gradient = gradient.flatten(0, -2).sum(0)
        input_gradient = None if summing is None else wait(summing)
        return input_gradient, weight_gradient, bias_gradient, None, None, None


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel, sequence: bool
) -> Tensor:
    """``x W^T + b`` where this rank holds rows of W and b; see :class:`_ColumnLinear` for the shapes.

    Args:
        x: ``[T, K]`` the same on every rank, or with ``sequence`` this rank's ``[T/t, K]``.
        weight: ``[N, K]``, of which this rank holds ``[N/t, K]``.
        bias: ``[N]``, divided alike, or None.
        sequence: whether x is divided by token.
    """
    local_weight = local_tensor(weight)
    local_bias = None if bias is None else local_tensor(bias)
    queue = active_queue()
    if queue is not None and x.requires_grad:
        full = all_gather_tokens(x, tp) if sequence else copy_to_ranks(x, tp)
        out = deferred_linear(full, weight, local_weight, queue)
        return out if local_bias is None else out + local_bias
    if tp.size == 1:
        return linear(x, local_weight, local_bias)
    return _ColumnLinear.apply(x, local_weight, local_bias, sequence, tp.size, tp.group_name)


class _ParallelLinear(ParallelModule):
    """A matrix that the tensor ranks divide by its rows or columns, and a bias, divided as the rows are."""

    _dim: ClassVar[int]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init_std: float,
        tp: TensorParallel = SINGLE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.tp = in_features, out_features, tp
        shape = (out_features, in_features)
        local_size(shape[self._dim], tp, f"the number of {('output', 'input')[self._dim]} features")
        self.weight = sharded_parameter(shape, tp, dim=self._dim, device=device, dtype=dtype)
        self.initializers["weight"] = Normal(init_std)
        self.bias: nn.Parameter | None = None
        if bias:
            divides = tp if self._dim == 0 else SINGLE
            self.bias = sharded_parameter((out_features,), divides, dim=0, device=device, dtype=dtype)
            self.initializers["bias"] = Constant(0.0)
            if tp.sequence and self._dim == 1:
                self.token_partial = ("bias",)

    def extra_repr(self) -> str:
        """Global sizes, and the share of this rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tensor_rank={self.tp.rank}/{self.tp.size}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose output features are divided over the tensor ranks.

    Args:
        in_features: K.
        out_features: N, which the tensor size must divide.
        bias: whether to add a bias (divided like the output).
        init_std: standard deviation of the initial weights; biases start at 0.

    Raises:
        UserError: the tensor size does not divide ``out_features``.
    """

    _dim = 0

    def forward(self, x: Tensor) -> Tensor:
        """``[T, K]`` (or ``[T/t, K]`` under sequence parallelism) to ``[T, N/t]``."""
        return column_parallel_linear(x, self.weight, self.bias, self.tp, self.tp.sequence)


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose input features are divided over the tensor ranks.

    The bias is whole on every rank and added once, after the sum; under sequence parallelism each rank adds it to its
    own tokens, so its gradient is partial.

    Args:
        in_features: K, which the tensor size must divide.
        out_features: N.
        bias: whether to add a bias.
        init_std: standard deviation of the initial weights; the bias starts at 0.

    Raises:
        UserError: the tensor size does not divide ``in_features``.
    """

    _dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """``[T, K/t]`` to ``[T, N]``, or to ``[T/t, N]`` under sequence parallelism."""
        return self.finish(self.product(x))

    def product(self, x: Tensor) -> Tensor:
        """This rank's share of the sum: ``[T, K/t]`` to ``[T, N]``; on a single rank with the bias already in it."""
        weight = local_tensor(self.weight)
        queue = active_queue()
        if queue is not None and x.requires_grad:
            out = deferred_linear(x, self.weight, weight, queue)
            return out + self.bias if self.tp.size == 1 and self.bias is not None else out
        return linear(x, weight, self.bias if self.tp.size == 1 else None)

    def finish(self, product: Tensor) -> Tensor:
        """Sum the ranks' shares and add the bias."""
        if self.tp.size == 1:
            return product
        out = _leave_region(product, self.tp)
        return out if self.bias is None else out + self.bias


def _leave_region(partial: Tensor, tp: TensorParallel) -> Tensor:
    """Sum partial results over the ranks: whole on each, or under sequence parallelism each rank's own tokens."""
    return reduce_scatter_tokens(partial, tp) if tp.sequence else reduce_from_ranks(partial, tp)


class _AddedRows(torch.autograd.Function):
    """Rows of a table whose gradient stays where it is, or is given by another use of the table too: added to there.

    Autograd would make a gradient of the size of the whole table, most of it zeros, and add both.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        held, table = ctx.table.grad, ctx.table
        if held is None:
            rows: Tensor = torch.ops.aten.embedding_dense_backward(gradient, ids, table.shape[0], -1, False)
            return rows, None
        held.index_add_(0, ids, gradient.to(held.dtype))
        return None, None


class VocabParallelEmbedding(ParallelModule):
    """An embedding table whose rows are divided over the tensor ranks.

    The table is padded to ``padded_vocab_size`` rows; padding rows start at zero, are never looked up and take no part
    in :func:`parallel.cross_entropy.vocab_parallel_cross_entropy`.

    Args:
        vocab_size: V, number of real rows.
        padded_vocab_size: rows in the table, which the tensor size must divide.
        embedding_dim: N.
        init_std: standard deviation of the initial rows.

    Attributes:
        tied: whether the table has another use in every forward pass, as the output matrix of a head. On processors,
            ``backward()`` then adds to its ``grad`` in place, where that is kept. Training steps may do so untied, too.

    Raises:
        UserError: the tensor size does not divide the padded vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_vocab_size: int,
        embedding_dim: int,
        *,
        init_std: float,
        tp: TensorParallel = SINGLE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert padded_vocab_size >= vocab_size, "a padded vocabulary is at least as large as the vocabulary"
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.embedding_dim, self.tp = embedding_dim, tp
        rows = local_size(padded_vocab_size, tp, "the padded vocabulary")
        self.first_row = tp.rank * rows
        self.weight = sharded_parameter((padded_vocab_size, embedding_dim), tp, dim=0, device=device, dtype=dtype)
        self.initializers["weight"] = Normal(init_std, rows=vocab_size)
        self.tied = False

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[T]`` (the same on every rank) to ``[T, N]``, or to ``[T/t, N]`` under sequence parallelism."""
        weight = local_tensor(self.weight)
        if self.tp.size == 1:
            return self._rows(weight, ids)
        local_ids = ids - self.first_row
        elsewhere = (local_ids < 0) | (local_ids >= weight.shape[0])
        rows = self._rows(weight, local_ids.masked_fill(elsewhere, 0))
        return _leave_region(rows.masked_fill(elsewhere[..., None], 0.0), self.tp)

    def _rows(self, weight: Tensor, ids: Tensor) -> Tensor:
        if adds_in_place(weight) or (self.tied and self._adds_to_other(weight)):
            rows: Tensor = _AddedRows.apply(weight, ids)
            return rows
        return F.embedding(ids, weight)

    def _adds_to_other(self, weight: Tensor) -> bool:
        # Where weight gradients wait in a queue, autograd sees that of the embedding alone. On GPUs, additions in place
        # come in any order, and are not worth it.
        plain = weight is self.weight and weight.device.type == "cpu" and not on_gpu(weight)
        return plain and torch.is_grad_enabled() and active_queue() is None

    def extra_repr(self) -> str:
        """Global sizes, and the share of this rank."""
        return (
            f"vocab_size={self.vocab_size}, padded={self.padded_vocab_size}, embedding_dim={self.embedding_dim}, "
            f"tensor_rank={self.tp.rank}/{self.tp.size}"
        )


def select_tokens(hidden: Tensor, index: Tensor, tp: TensorParallel) -> Tensor:
    """Rows ``index`` of the global token axis, on every rank: ``[S, H]``, replicated.

    Under sequence parallelism each rank gives the rows it holds and the few selected rows are summed, instead of
    gathering all T tokens; the gradient of a row goes back to the rank that holds it.

    Args:
        hidden: ``[T, H]``, or ``[T/t, H]`` under sequence parallelism.
        index: ``[S]`` positions on the global token axis.
    """
    if not tp.sequence:
        return hidden.index_select(0, index)
    share = hidden.shape[0]
    local_index = index - tp.rank * share
    elsewhere = (local_index < 0) | (local_index >= share)
    rows = hidden.index_select(0, local_index.masked_fill(elsewhere, 0))
    return reduce_from_ranks(rows.masked_fill(elsewhere[:, None], 0.0), tp)
