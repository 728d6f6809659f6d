# SPDX-License-Identifier: Apache-2.0
"""I-BERT models with fewer heads or more words, in floating point and in integers."""

from __future__ import annotations

import pytest
import torch

from megatron_bert import IBertForMaskedLM
from megatron_bert.ibert import in_mode
from tests.megatron_bert.family.support import CLOSE, CONFIG, labels_for
from tests.megatron_bert.ibert.family.support import batch_for, build, config_of

HEAD = "ForMaskedLM"


def test_pruned_heads_are_those_that_a_mask_leaves_out(tmp_path):
    model = build(HEAD)
    batch = batch_for(HEAD)
    mask = torch.ones(CONFIG.num_hidden_layers, CONFIG.num_attention_heads)
    mask[0, [1, 3]] = 0
    mask[1, 0] = 0
    masked = model(**batch, head_mask=mask, output_attentions=True)
    assert masked.attentions[0][:, [1, 3]].eq(0).all()
    model.prune_heads({0: [1, 3], 1: [0]})
    torch.testing.assert_close(model(**batch).logits, masked.logits, **CLOSE)
    model.save_pretrained(tmp_path)
    again = IBertForMaskedLM.from_pretrained(tmp_path)
    assert again(**batch).logits.equal(model(**batch).logits)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "integers"])
def test_more_words_and_fewer_heads(quantized):
    """Words that were there keep their logits; in integers nearly, for ranges go on following."""
    model = build(HEAD, config_of(HEAD, initializer_range=0.08, quant_mode=quantized)).train()
    batch = batch_for(HEAD) | labels_for(HEAD)
    model(**batch)
    before = model.eval()(**batch).logits
    model.resize_token_embeddings(120)
    after = model(**batch).logits
    assert after.shape[-1] == 120
    assert after[..., :91].equal(before)
    model.prune_heads({1: [2]})
    model.train()(**batch).loss.backward()
    found = model.eval()(**batch).logits
    with torch.no_grad(), in_mode(model, "float"):
        expected = model(**batch).logits
    atol = 0.1 * float(expected.abs().max()) if quantized else 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert model.get_input_embeddings().weight.grad.shape[0] == 120
