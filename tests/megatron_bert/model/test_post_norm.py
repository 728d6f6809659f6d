# SPDX-License-Identifier: Apache-2.0
"""Post-layer-norm: beside transformers' BERT, and one result however the model is divided, packed or recomputed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_bert.model.batch import token_keys
from megatron_bert.model.configuration import config_from_dict
from megatron_bert.model.pretraining import BertForPretraining
from parallel.errors import UserError
from parallel.pipeline.stage import StagePart
from tests.megatron_bert.model.huggingface import assert_trains_as, to_huggingface
from tests.megatron_bert.model.support import (
    CONFIG,
    assert_steps_equal,
    make_batch,
    make_model,
    step,
)
from tests.worlds import Together, make_tensor_parallel, run_world

POST = {"layer_norm_placement": "post"}
#: As in test_pretraining.py: float32 sums of up to 96 terms in another order, relative to the largest element.
TOLERANCE = 1e-5
DROPOUT = pytest.mark.parametrize("seed", [None, 42], ids=["still", "dropout"])


def _their_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' BertForPreTraining: those of MegatronBert's, but for the norms."""
    embedding_norm = {
        f"bert.embeddings.LayerNorm.{kind}": tensors[f"embeddings.norm.{kind}"] for kind in ("weight", "bias")
    }
    others = to_huggingface({n: t for n, t in tensors.items() if not n.startswith("embeddings.norm")})
    renamed = {}
    for name, tensor in others.items():
        inside = ".attention.ln." in name
        theirs = name.replace(".attention.ln.", ".attention.output.LayerNorm.")
        renamed[theirs if inside else theirs.replace(".ln.", ".output.LayerNorm.")] = tensor
    return embedding_norm | renamed


def test_same_logits_loss_and_gradients_as_bert():
    assert_trains_as("Bert", make_model(**POST), make_batch(), _their_names)


def test_no_final_norm_and_as_many_parameters():
    # The norm of the embeddings takes the place of the final one.
    counts = {}
    for placement in ("pre", "post"):
        model = BertForPretraining(replace(CONFIG, layer_norm_placement=placement), device="meta")
        counts[placement] = sum(parameter.numel() for parameter in model.parameters())
        assert (model.encoder.final_norm is None) == (placement == "post")
        assert (model.embeddings.norm is None) == (placement == "pre")
    assert counts["pre"] == counts["post"]


@DROPOUT
def test_packed_and_padded_agree(seed):
    padded, packed = (step(make_model(**POST), make_batch(packed=packed), seed) for packed in (False, True))
    assert_steps_equal(packed, padded, TOLERANCE)


def _divided(sequence: bool, packed: bool, seed: int | None) -> dict[str, Tensor]:
    return step(make_model(tp=make_tensor_parallel(sequence=sequence), **POST), make_batch(packed=packed), seed)


DIVISIONS = [(2, False, True), (2, True, False), (4, True, True)]
DIVIDED = Together(*((size, _divided, *case, seed) for size, *case in DIVISIONS for seed in (None, 42)))


@DROPOUT
@pytest.mark.parametrize(("size", "sequence", "packed"), DIVISIONS, ids=str)
def test_tensor_parallel(size, sequence, packed, seed):
    expected = step(make_model(**POST), make_batch(packed=packed), seed)
    for results in DIVIDED(size, _divided, sequence, packed, seed):
        assert_steps_equal(results, expected, TOLERANCE)


def _recomputed(sequence: bool, seed: int | None) -> None:
    tp, batch = make_tensor_parallel(sequence=sequence), make_batch()
    expected = step(make_model(tp=tp, **POST), batch, seed)
    for mode in ("selective", "full"):
        assert_steps_equal(step(make_model(tp=tp, recompute=mode, **POST), batch, seed), expected, 0.0)


@DROPOUT
@pytest.mark.parametrize(("size", "sequence"), [(1, False), (2, True)], ids=str)
def test_recomputation_changes_no_bit(size, sequence, seed):
    run_world(size, _recomputed, sequence, seed)


@DROPOUT
def test_parts_of_a_pipeline(seed):
    """Two stages one after the other give the bits, and the gradients, of the whole model."""
    whole, batch = make_model(**POST), make_batch()
    parts = [StagePart(range(1), first=True, last=False), StagePart(range(1, 2), first=False, last=True)]
    stages = [BertForPretraining(whole.config, part=part) for part in parts]
    weights = whole.state_dict()
    for stage in stages:
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
    expected = whole(batch, seed)
    logits = stages[1](batch, seed, received=stages[0](batch, seed))
    assert logits.masked.equal(expected.masked)
    for result in (logits, expected):
        (result.masked.square().mean() + result.pair.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if not name.startswith("embeddings.word"):  # whose two uses are on two stages
                assert parameter.grad.equal(gradients[name]), name


def test_dropout_of_the_embeddings_follows_their_norm():
    model, batch = make_model(**POST, hidden_dropout_prob=0.5), make_batch()
    still, dropped = (
        model.embeddings(batch.tokens, batch.positions, batch.types, keys)
        for keys in (None, token_keys(batch.samples, batch.positions, 42))
    )
    kept = dropped != 0
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(dropped[kept], 2 * still[kept], rtol=1e-6, atol=0)


def test_configuration_keeps_its_layout():
    post = replace(CONFIG, **POST)
    assert config_from_dict(json.loads(json.dumps(post.to_dict())), "a file") == post
    with pytest.raises(UserError, match=r"layer_norm_placement is 'sandwich': choose one of pre, post"):
        replace(CONFIG, layer_norm_placement="sandwich")
