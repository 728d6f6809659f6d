# SPDX-License-Identifier: Apache-2.0
"""The classes are the pretraining model: same names, same initial weights, same results."""

from __future__ import annotations

import pytest
import torch

from megatron_bert import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.convert.huggingface_names import MEGATRON_BERT, separate
from megatron_bert.model.pretraining import BertForPretraining
from parallel.sharding import initialize
from tests.megatron_bert.model.support import CONFIG, LENGTH, make_batch, make_model

SIZES = MegatronBertConfig.from_dict(CONFIG.to_dict())


def _documented(model):
    """Its parameters by the names and in the shapes of the documented classes."""
    found = {}
    for name, tensor in model.named_parameters():
        keys = MEGATRON_BERT.theirs(name)
        by_word = name in ("embeddings.word_embeddings.weight", "masked_head.bias")
        parts = separate(tensor[: CONFIG.vocab_size] if by_word else tensor, len(keys), CONFIG.head_dim)
        found |= dict(zip(keys, parts, strict=True))
    return found


def test_pretraining_weights_fit_by_name():
    trained, batch = make_model(), make_batch()
    model = MegatronBertForPreTraining(SIZES, initial=False).eval()
    weights = _documented(trained)
    assert {name for name, _ in model.named_parameters()} == weights.keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    out = model(
        batch.tokens.view(-1, LENGTH),
        batch.layout.key_mask,
        batch.types.view(-1, LENGTH),
    )
    logits = trained(batch)
    expected = logits.masked[:10, : CONFIG.vocab_size]
    found = out.prediction_logits.flatten(0, 1)[batch.slots[:10]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.seq_relationship_logits, logits.pair, rtol=1e-5, atol=1e-5)


def test_initial_weights_are_those_of_pretraining():
    torch.manual_seed(1)
    seed = int(torch.randint(1 << 62, (1,)))
    pretraining = BertForPretraining(CONFIG)
    initialize(pretraining, seed)
    torch.manual_seed(1)
    model = MegatronBertForPreTraining(SIZES)
    weights = _documented(pretraining)
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[name]), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_training_step_learns(recompute):
    torch.manual_seed(0)
    model = MegatronBertForPreTraining(SIZES)
    if recompute == "full":
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(1, CONFIG.vocab_size, (4, LENGTH))
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids, next_sentence_label=torch.tensor([0, 1, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
