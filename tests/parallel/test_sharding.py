# SPDX-License-Identifier: Apache-2.0
"""Initial weights: the same bits at every layout, with the distribution asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.errors import UserError
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.mesh import SINGLE
from parallel.sharding import Constant, Normal, ParallelModule, initialize, local_size, name_seed, sharded_parameter
from tests.parallel.support import ToyModel
from tests.worlds import make_tensor_parallel, run_world

SEED = 3_485_921_479_068_119_694


def _gathered(sequence: bool, seed: int) -> dict[str, Tensor]:
    tp = make_tensor_parallel(sequence=sequence)
    model = ToyModel(tp=tp)
    initialize(model, seed)
    whole = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            assert tuple(parameter.to_local().shape) != tuple(parameter.shape)
            whole[name] = parameter.full_tensor().detach()
        else:
            whole[name] = parameter.detach()
    return whole


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathered_weights_are_equal_bit_for_bit(size, sequence):
    expected = _gathered(False, 7)  # this process, no group
    for weights in run_world(size, _gathered, sequence, 7):
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert weight.equal(expected[name]), name


def test_padding_rows_and_biases_start_at_zero():
    weights = _gathered(False, 7)
    assert weights["embedding.weight"][ToyModel.VOCABULARY :].eq(0).all()
    assert weights["embedding.weight"][: ToyModel.VOCABULARY].ne(0).all()
    assert weights["layers.0.column.bias"].eq(0).all()
    assert weights["layers.0.norm.weight"].eq(1).all()


def test_padding_does_not_change_the_real_rows():
    tables = []
    for padded in (12, 64):
        table = VocabParallelEmbedding(10, padded, 6, init_std=0.02)
        initialize(table, 3)
        tables.append(table.weight.detach())
    assert tables[0][:10].equal(tables[1][:10])


@pytest.mark.parametrize("std", [0.02, 1.5])
def test_the_standard_deviation_is_right(std):
    layer = ColumnParallelLinear(400, 500, init_std=std)
    initialize(layer, 1)
    weight = layer.weight.detach().double()
    n = weight.numel()
    # Of n normal numbers: the mean has deviation std / sqrt(n), the standard deviation std / sqrt(2n); six of them.
    assert abs(float(weight.mean())) < 6 * std / math.sqrt(n)
    assert abs(float(weight.std()) - std) < 6 * std / math.sqrt(2 * n)


def test_names_and_seeds_give_different_values():
    first, second = _gathered(False, 7), _gathered(False, 8)
    assert not first["layers.0.column.weight"].equal(first["layers.1.column.weight"])
    assert not first["layers.0.column.weight"].equal(second["layers.0.column.weight"])
    assert not first["layers.0.column.weight"].equal(first["layers.0.row.weight"].view(8, 6))


def test_values_follow_the_global_name():
    whole = ToyModel()
    initialize(whole, 7)
    part = ToyModel().layers[1]
    initialize(part, 7, prefix="layers.1.")
    assert part.row.weight.equal(whole.layers[1].row.weight)


def test_initial_values_are_pinned():
    # Two runs with one seed must start alike, whatever version made them.
    assert name_seed(1234, "encoder.layers.0.attention.output.weight") == SEED
    assert 0 <= name_seed(0, "a") < 2**63


def test_initialization_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    initialize(ToyModel(), 7)
    assert torch.get_rng_state().equal(before)


def test_other_types_start_from_the_same_numbers():
    exact, rounded = (RowParallelLinear(6, 4, init_std=1.0, dtype=dtype) for dtype in (None, torch.bfloat16))
    initialize(exact, 1)
    initialize(rounded, 1)
    assert rounded.weight.equal(exact.weight.to(torch.bfloat16))


def test_a_module_must_say_how_it_starts():
    with pytest.raises(TypeError, match="Linear holds parameters but is not a ParallelModule"):
        initialize(nn.Linear(2, 2), 1)
    with pytest.raises(TypeError, match="1 holds parameters but is not a ParallelModule"):
        initialize(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), 1)

    class Silent(ParallelModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2))

    with pytest.raises(TypeError, match=r"part\.weight has no initializer"):
        initialize(Silent(), 1, prefix="part.")


def _shards() -> None:
    tp = make_tensor_parallel()
    for dim, local in ((0, (3, 4)), (1, (6, 2))):
        parameter = sharded_parameter((6, 4), tp, dim=dim)
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter, DTensor)
        assert tuple(parameter.shape) == (6, 4)
        assert parameter.stride() == (4, 1)
        assert tuple(parameter.to_local().shape) == local
        assert parameter.placements == (Shard(dim),)
        assert parameter.device_mesh.mesh_dim_names == ("tensor",)
        meta = sharded_parameter((6, 4), tp, dim=dim, device="meta", dtype=torch.bfloat16)
        assert meta.is_meta
        assert meta.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dimension 0 of a parameter of shape"):
        sharded_parameter((5, 4), tp, dim=0)


def test_sharded_parameters_know_the_whole():
    run_world(2, _shards)
    assert type(sharded_parameter((6, 4), SINGLE, dim=0)) is nn.Parameter


def test_local_size():
    assert local_size(8, SINGLE, "anything") == 8


def test_initializers_are_values():
    assert Normal(0.5) == Normal(0.5, rows=None)
    assert Constant(1.0) != Constant(0.0)
