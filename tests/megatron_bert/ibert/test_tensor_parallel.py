# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: the same bits at every size, and ranges that ranks agree on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_bert.ibert import (
    QuantizationConfig,
    calibrate,
    named_ranges,
    quantize_model,
    update_ranges,
)
from parallel.collectives import gather_from_ranks
from parallel.data_parallel import apply_data_parallel
from tests.megatron_bert.model.support import make_batch, make_model, step, total_loss
from tests.worlds import Together, make_mesh, make_tensor_parallel, run_world

OBSERVERS, DTYPES = ("min_max", "mse"), (torch.float32, torch.bfloat16)
CONFIGS = ({}, {"weight_bits": 7, "observer": "percentile"})


def _forward(placement: str, packed: bool, sequence: bool, ranges: dict | None, settings: dict, dropout: float):
    """Logits, gradients and ranges; calibrated here unless ranges are given."""
    tp = make_tensor_parallel(sequence=sequence)
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = make_model(tp=tp, layer_norm_placement=placement, **chances)
    quantize_model(model, QuantizationConfig(**settings))
    batch = make_batch(packed=packed)
    if ranges is None:
        calibrate(model, [batch], model)
    else:
        for name, value in named_ranges(model).items():
            value.copy_(ranges[name])
    seed = 3 if dropout else None
    out = model(batch, seed)
    masked = gather_from_ranks(out.masked, tp)
    results = step(model, batch, seed)
    return {"masked": masked.detach(), "pair": out.pair.detach()}, results, named_ranges(model)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_same_bits_at_every_size(placement):
    for sizes, packed, sequence, settings, dropout in (
        ((2, 4), False, False, CONFIGS[0], 0.0),
        ((4,), True, True, CONFIGS[1], 0.1),
    ):
        logits, gradients, ranges = _forward(placement, packed, False, None, settings, dropout)
        for size in sizes:
            arguments = (placement, packed, sequence, ranges, settings, dropout)
            for found, found_gradients, _ in run_world(size, _forward, *arguments):
                for name, value in logits.items():
                    assert torch.equal(found[name], value), (size, name)
                for name, value in gradients.items():
                    torch.testing.assert_close(
                        found_gradients[name], value, rtol=0, atol=1e-5 * max(1.0, float(value.abs().max()))
                    )


def _calibrated(observer: str):
    tp = make_tensor_parallel()
    model = make_model(tp=tp)
    quantize_model(model, QuantizationConfig(observer=observer))
    batch = make_batch(samples=100)
    calibrate(model, [batch], model)
    calibrated = {name: float(value) for name, value in named_ranges(model).items()}
    model.train()
    total_loss(model, batch).backward()
    update_ranges(model)
    return calibrated, {name: float(value) for name, value in named_ranges(model).items()}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranks_agree_on_ranges(observer):
    alone = make_model()
    quantize_model(alone, QuantizationConfig(observer=observer))
    calibrate(alone, [make_batch()], alone)
    expected = {name: float(value) for name, value in named_ranges(alone).items()}
    results = PAIRS(2, _calibrated, observer)
    assert results[0] == results[1]
    for name, value in results[0][0].items():
        # Histogram bins are 2.2% wide: a sum that rounds otherwise may fall into the next.
        assert math.isclose(value, expected[name], rel_tol=0.045 if observer == "mse" else 1e-5), name
    moved = [name for name, value in results[0][1].items() if value != results[0][0][name]]
    assert bool(moved)


def _calibrated_on_other_data():
    mesh = make_mesh(data=2)
    model, batch = make_model(), make_batch()
    quantize_model(model, QuantizationConfig())
    if mesh.data_rank == 1:
        batch = replace(batch, tokens=batch.tokens.flip(0))
    calibrate(model, [batch], model, [mesh.device_mesh.get_group("data_replicate")])
    return {name: float(value) for name, value in named_ranges(model).items()}


def test_data_ranks_put_together_what_they_saw():
    ranges = []
    for flip in (False, True):
        model, batch = make_model(), make_batch()
        quantize_model(model, QuantizationConfig())
        calibrate(model, [replace(batch, tokens=batch.tokens.flip(0)) if flip else batch], model)
        ranges.append({name: float(value) for name, value in named_ranges(model).items()})
    results = PAIRS(2, _calibrated_on_other_data)
    assert results[0] == results[1] == {name: max(value, ranges[1][name]) for name, value in ranges[0].items()}
    assert results[0] not in ranges


def _sharded_step(dtype: torch.dtype):
    """Loss and gradients of a step whose parameters are divided over two data ranks that read the same batch."""
    mesh = make_mesh(data=2, data_shard=2)
    model, batch = make_model(), make_batch()
    quantize_model(model, QuantizationConfig())
    layers = model.encoder.layer_list()
    apply_data_parallel(model, layers, mesh, sharding="full", compute_dtype=dtype, cast_inputs=False)
    calibrate(model, [batch], model, [mesh.device_mesh.get_group("data_shard")])
    return step(model, batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_sharded_data_parallelism(dtype):
    model, batch = make_model(), make_batch()
    quantize_model(model, QuantizationConfig())
    calibrate(model, [batch], model)
    alone = step(model, batch)
    for found in PAIRS(2, _sharded_step, dtype):
        for name, value in alone.items():
            # Two ranks' gradients of the same batch are summed. bfloat16 rounds weights and gradients to 8 bits.
            double = value if name == "loss" else 2 * value
            error = (found[name] - double).norm() / double.norm()
            assert float(error) <= (0.0 if dtype == torch.float32 else 0.25), name


#: Of all tests above that need two ranks and no result of one.
PAIRS = Together(
    *((2, _calibrated, observer) for observer in OBSERVERS),
    (2, _calibrated_on_other_data),
    *((2, _sharded_step, dtype) for dtype in DTYPES),
)


def _bits(size_of_parts: int):
    from megatron_bert.ibert.products import sum_over_ranks

    tp = make_tensor_parallel()
    sums = torch.full((2, 3), float(2**23 + size_of_parts + tp.rank))
    return sum_over_ranks(sums, tp)


def test_sums_over_ranks_are_exact_beyond_float32():
    for found in run_world(4, _bits, 1):
        assert found.flatten().tolist() == [float(4 * (2**23 + 1) + 6)] * 6
