"""Post-layer-norm: beside transformers' BERT, and one result however the model is divided, packed or recomputed."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError
from parallel.pipeline.stage import StagePart
from tests.megatron_bert.model.support import (
    CONFIG,
    LENGTH,
    assert_steps_equal,
    make_batch,
    make_model,
    step,
    total_loss,
)
from tests.megatron_bert.model.test_huggingface import to_huggingface
from tests.worlds import make_tensor_parallel, run_world

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
    transformers = pytest.importorskip("transformers")
    model, batch = make_model(**POST), make_batch()
    sizes = asdict(CONFIG) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = transformers.BertConfig().to_dict().keys()
    config = transformers.BertConfig(**{name: value for name, value in sizes.items() if name in names})
    peer = transformers.BertForPreTraining(config).eval()
    weights = _their_names(dict(model.named_parameters()))
    missing, unexpected = peer.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    peer.tie_weights()

    used = batch.slot_labels != IGNORED
    labels = torch.full_like(batch.tokens, IGNORED)
    labels[batch.slots[used]] = batch.slot_labels[used]
    square = lambda tensor: tensor.view(-1, LENGTH)  # noqa: E731
    theirs = peer(
        input_ids=square(batch.tokens),
        attention_mask=batch.layout.key_mask.long(),
        token_type_ids=square(batch.types),
        labels=square(labels),
        next_sentence_label=batch.pair_labels,
    )
    ours = model(batch)
    close = {"rtol": 1e-5, "atol": 1e-5}
    masked = ours.masked[used][:, : CONFIG.vocab_size]
    torch.testing.assert_close(masked, theirs.prediction_logits.flatten(0, 1)[batch.slots[used]], **close)
    torch.testing.assert_close(ours.pair, theirs.seq_relationship_logits, **close)
    loss = total_loss(model, batch)
    torch.testing.assert_close(loss, theirs.loss, **close)
    loss.backward()
    theirs.loss.backward()
    gradients = _their_names({name: parameter.grad for name, parameter in model.named_parameters()})
    compared = {name for name, _ in peer.named_parameters()}
    assert compared == gradients.keys()
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


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


@DROPOUT
@pytest.mark.parametrize(("size", "sequence", "packed"), [(2, False, True), (2, True, False), (4, True, True)], ids=str)
def test_tensor_parallel(size, sequence, packed, seed):
    expected = step(make_model(**POST), make_batch(packed=packed), seed)
    for results in run_world(size, _divided, sequence, packed, seed):
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
        model.embeddings(batch.tokens, batch.positions, batch.types, keys) for keys in (None, batch.dropout_keys(42))
    )
    kept = dropped != 0
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(dropped[kept], 2 * still[kept], rtol=1e-6, atol=0)


def test_configuration_keeps_its_layout():
    assert "layer_norm_placement" not in CONFIG.to_dict()
    post = replace(CONFIG, **POST)
    assert MegatronBertConfig.from_dict(post.to_dict()) == post
    with pytest.raises(UserError, match=r"layer_norm_placement is 'sandwich': choose one of pre, post"):
        replace(CONFIG, layer_norm_placement="sandwich")
