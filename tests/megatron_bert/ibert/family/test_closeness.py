# SPDX-License-Identifier: Apache-2.0
"""Integers beside floating point, and beside transformers' quant_mode: whole models of 12 layers, untrained.

Both find their ranges in one pass of training over the batch they are then compared on. The error is the norm of the
difference of all logits to those of the float model, relative to the norm of these.
"""

from __future__ import annotations

import pytest
import torch

from megatron_bert import IBertConfig, IBertForMaskedLM

transformers = pytest.importorskip("transformers")
CONFIG = IBertConfig(
    vocab_size=500,
    hidden_size=128,
    num_hidden_layers=12,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=514,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.08,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The float model, ours in integers and transformers' with quant_mode, all with the same weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = IBertForMaskedLM(CONFIG).eval()
    model.save_pretrained(folder)
    ours = IBertForMaskedLM.from_pretrained(folder, quant_mode=True)
    return model, ours, transformers.IBertForMaskedLM.from_pretrained(folder, quant_mode=True)


@torch.no_grad()
@pytest.mark.parametrize(("length", "theirs"), [(16, 0.08), (300, 0.5)])
def test_errors(length, theirs, models):
    """Ours does not depend on the length; theirs loses the mass of attention to many keys."""
    model, *quantized = models
    ids = torch.randint(2, 500, (1, length), generator=torch.Generator().manual_seed(1))
    errors = []
    expected = model(ids).logits
    for each in quantized:
        each.train()(ids)
        difference = each.eval()(ids).logits - expected
        errors.append(float(difference.norm() / expected.norm()))
    assert errors[0] < 0.08
    assert errors[1] > theirs
