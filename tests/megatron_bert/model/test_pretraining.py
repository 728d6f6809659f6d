# SPDX-License-Identifier: Apache-2.0
"""The pretraining model: packed and padded, divided and whole, recomputed and kept, all give one result."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import correct_counts, loss_sums
from parallel.cross_entropy import IGNORED
from parallel.dropout import fold_in
from parallel.sharding import initialize
from tests.megatron_bert.model.support import (
    CONFIG,
    LENGTHS,
    assert_steps_equal,
    make_batch,
    make_model,
    make_rows,
    step,
    total_loss,
    whole,
)
from tests.parallel.support import Operators
from tests.worlds import Together, make_tensor_parallel, run_world

DROPOUT = pytest.mark.parametrize("seed", [None, 42], ids=["still", "dropout"])
#: float32 sums of up to 96 terms in another order, two layers deep, relative to the largest element of a tensor.
TOLERANCE = 1e-5


@DROPOUT
def test_packed_and_padded_agree(seed):
    padded, packed = (step(make_model(), make_batch(packed=packed), seed) for packed in (False, True))
    assert_steps_equal(packed, padded, TOLERANCE)
    logits = [make_model()(make_batch(packed=packed), seed) for packed in (False, True)]
    used = make_batch().slot_labels != IGNORED
    torch.testing.assert_close(logits[1].masked[used], logits[0].masked[used], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(logits[1].pair, logits[0].pair, rtol=TOLERANCE, atol=TOLERANCE)


@DROPOUT
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_rows_agree(monkeypatch, seed, compiled, swapped):
    """Also where attention works on rows that hold several sequences, as it does in compiled code."""
    expected, batch = step(make_model(), make_batch(), seed), make_rows(swapped=swapped)
    assert batch.layout.fill == 3 * 16 - sum(LENGTHS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    assert_steps_equal(step(make_model(), batch, seed), expected, TOLERANCE)


def test_longer_padding_changes_nothing_with_dropout_on():
    batch = make_batch(packed=True)
    wider = replace(batch, layout=replace(batch.layout, length=16, places=_places(16)))
    assert_steps_equal(step(make_model(), wider, 42), step(make_model(), batch, 42), TOLERANCE)


def _places(longest: int) -> Tensor:
    return torch.cat([row * longest + torch.arange(length) for row, length in enumerate(LENGTHS)])


def test_dropout_follows_the_sample_and_the_seed():
    losses = {
        (samples, seed): float(total_loss(make_model(), make_batch(samples=samples), seed).detach())
        for samples in (100, 200)
        for seed in (None, 42, 43)
    }
    assert losses[100, None] == losses[200, None]
    assert len(set(losses.values())) == 5


def test_keys_of_all_layers_are_those_of_each():
    model, keys = make_model(), torch.arange(7)
    layers = model.encoder._layer_keys(keys)
    assert len(layers) == CONFIG.num_hidden_layers
    for number, folded in enumerate(layers):
        assert folded.equal(fold_in(keys, 1 + number))


def test_dropout_of_each_kind_changes_the_loss():
    def loss(**changes: float) -> float:
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return float(total_loss(make_model(**(off | changes)), make_batch(), 42).detach())

    still = float(total_loss(make_model(), make_batch()).detach())
    # With both rates zero only the attention path may differ: fused or written out.
    assert loss() == pytest.approx(still, abs=TOLERANCE)
    assert abs(loss(hidden_dropout_prob=0.1) - still) > 1e-3
    assert abs(loss(attention_probs_dropout_prob=0.1) - still) > 1e-3


def test_a_sample_does_not_see_its_neighbors():
    batch, model = make_batch(), make_model()
    tokens = batch.tokens.view(len(LENGTHS), -1).clone()
    tokens[0] = (tokens[0] + 7) % CONFIG.vocab_size
    before, after = model(batch, 42), model(replace(batch, tokens=tokens.flatten()), 42)
    torch.testing.assert_close(after.pair[1:], before.pair[1:], rtol=0, atol=0)
    assert not after.pair[0].equal(before.pair[0])


def test_sums_add_up_over_micro_batches():
    """A batch of five is its five batches of one: sums add up, dropout on."""
    model, batch = make_model(), make_batch()
    together = loss_sums(model(batch, 42), batch, CONFIG.vocab_size)
    apart = [loss_sums(model(part, 42), part, CONFIG.vocab_size) for part in _cut(batch)]
    torch.testing.assert_close(sum(part.masked for part in apart), together.masked, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(sum(part.pair for part in apart), together.pair, rtol=TOLERANCE, atol=0)


def _cut(batch: MicroBatch) -> list[MicroBatch]:
    length = batch.layout.length
    parts = []
    for row in range(batch.layout.batch):
        tokens = slice(row * length, (row + 1) * length)
        here = (batch.slots // length == row) & (batch.slot_labels != IGNORED)
        parts.append(
            replace(
                batch,
                **{name: getattr(batch, name)[tokens] for name in ("tokens", "positions", "types", "samples")},
                layout=replace(batch.layout, batch=1, key_mask=batch.layout.key_mask[row : row + 1]),
                slots=batch.slots[here] - row * length,
                slot_labels=batch.slot_labels[here],
                first_tokens=torch.zeros(1, dtype=torch.int64),
                pair_labels=batch.pair_labels[row : row + 1],
                lengths=batch.lengths[row : row + 1],
            )
        )
    return parts


def _divided(sequence: bool, packed: bool, seed: int | None) -> dict[str, Tensor]:
    tp = make_tensor_parallel(sequence=sequence)
    model, batch = make_model(tp=tp), make_batch(packed=packed)
    logits = model(batch, seed)
    gathered = [torch.empty_like(logits.masked) for _ in range(tp.size)]
    torch.distributed.all_gather(gathered, logits.masked.detach().contiguous())
    counts = correct_counts(logits, batch, CONFIG.vocab_size, tp)
    results = step(model, batch, seed)
    return results | {
        "logits": torch.cat(gathered, dim=1),
        "pair": logits.pair.detach(),
        "right": torch.stack(counts),
    }


DIVIDED = Together(
    *((size, _divided, *case) for size in (2, 4) for case in product((False, True), (False, True), (None, 42)))
)


@DROPOUT
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel(size, sequence, packed, seed):
    model, batch = make_model(), make_batch(packed=packed)
    logits = model(batch, seed)
    expected = step(model, batch, seed) | {
        "logits": logits.masked.detach(),
        "pair": logits.pair.detach(),
        "right": torch.stack(correct_counts(logits, batch, CONFIG.vocab_size)),
    }
    for results in DIVIDED(size, _divided, sequence, packed, seed):
        assert_steps_equal(results, expected, TOLERANCE)


def _recomputed(sequence: bool, seed: int | None) -> None:
    tp = make_tensor_parallel(sequence=sequence)
    batch = make_batch()
    expected = step(make_model(tp=tp), batch, seed)
    for mode in ("selective", "full"):
        assert_steps_equal(step(make_model(tp=tp, recompute=mode), batch, seed), expected, 0.0)


RECOMPUTED = Together(*((size, _recomputed, *case) for size in (1, 2) for case in product((False, True), (None, 42))))


@DROPOUT
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [1, 2])
def test_recomputation_changes_no_bit(size, sequence, seed):
    RECOMPUTED(size, _recomputed, sequence, seed)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_recomputation_of_other_activations_changes_no_bit(act):
    batch = make_batch()
    expected = step(make_model(hidden_act=act), batch, 42)
    for mode in ("selective", "full"):
        assert_steps_equal(step(make_model(hidden_act=act, recompute=mode), batch, 42), expected, 0.0)


def _communication(sequence: bool, seed: int | None) -> dict[str, int]:
    """Collectives in the backward pass of the whole model, by what the layers recompute."""
    tp = make_tensor_parallel(sequence=sequence)
    counts = {}
    for mode in ("none", "selective", "full"):
        loss = total_loss(make_model(tp=tp, recompute=mode), make_batch(), seed)
        with Operators() as backward:
            loss.backward()
        counts[mode] = backward.count("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    return counts


COMMUNICATION = Together(*((2, _communication, *case) for case in product((False, True), (None, 42))))


@DROPOUT
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_selective_recomputation_repeats_no_communication(sequence, seed):
    for counts in COMMUNICATION(2, _communication, sequence, seed):
        assert counts["selective"] == counts["none"]


@DROPOUT
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_full_recomputation_does_not_repeat_the_closing_collective(sequence, seed):
    for counts in COMMUNICATION(2, _communication, sequence, seed):
        # A layer has two sums, or two gathers and two scatters.
        assert counts["full"] == counts["none"] + CONFIG.num_hidden_layers * (3 if sequence else 1)


def _initial(sequence: bool) -> dict[str, Tensor]:
    model = make_model(tp=make_tensor_parallel(sequence=sequence))
    initialize(model, 9)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def test_initial_weights_are_equal_at_every_size():
    expected = _initial(False)
    for size in (2, 4):
        for weights in run_world(size, _initial, size == 4):
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                assert weight.equal(expected[name]), name
    assert expected["embeddings.word_embeddings.weight"][CONFIG.vocab_size :].eq(0).all()
    assert float(expected["encoder.layers.0.mlp.output.weight"].std()) == pytest.approx(
        CONFIG.initializer_range / 2, rel=0.1
    )  # scaled by 1 / sqrt(2 x 2 layers)


def test_correct_counts():
    model, batch = make_model(), make_batch()
    logits = model(batch)
    best = logits.masked[:, : CONFIG.vocab_size].argmax(dim=1)
    labels = batch.slot_labels.clone()
    labels[:4] = best[:4]
    labels[4:10] = (best[4:10] + 1) % CONFIG.vocab_size
    pair = logits.pair.argmax(dim=1)
    pair[0], pair[1] = 1 - pair[0], IGNORED
    counts = correct_counts(logits, replace(batch, slot_labels=labels, pair_labels=pair), CONFIG.vocab_size)
    assert (int(counts.masked), int(counts.pair)) == (4, 3)


def test_without_a_pair_objective():
    model, batch = make_model(binary_head=False), make_batch()
    logits = model(batch)
    assert logits.pair is None
    assert loss_sums(logits, batch, CONFIG.vocab_size).pair == 0
    assert correct_counts(logits, batch, CONFIG.vocab_size).pair == 0


def test_batches_move_whole():
    batch = make_batch(packed=True)
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.is_meta
    assert moved.layout.places.is_meta
    assert moved.lengths == LENGTHS
    assert moved.slots.is_meta
