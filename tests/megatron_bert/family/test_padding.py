# SPDX-License-Identifier: Apache-2.0
"""Padding: it changes nothing, whether it is computed or skipped."""

from __future__ import annotations

import pytest
import torch

from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    CONFIG,
    HEADS,
    LENGTH,
    assert_outputs_close,
    batch_for,
    build,
    changed,
    config_of,
    labels_for,
)

POOLED = ("ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice")
#: Real tokens in any places, the first among them.
HOLES = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])


def _tokens_computed(model, batch) -> int:
    """Rows that the first layer sees."""
    seen = []
    hook = model.layer_list()[0].intermediate.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[0])
    )
    model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("mask", [None, HOLES], ids=["right", "holes"])
@pytest.mark.parametrize("head", [head for head in HEADS if head not in ("ForMultipleChoice", "ForCausalLM")])
def test_skipped_equals_computed(head, mask):
    model = build(head)
    batch = batch_for(head)
    batch |= {} if mask is None else {"attention_mask": mask}
    real = batch["attention_mask"].bool()
    labels = labels_for(head)
    if "ForTokenClassification" in head or ("labels" in labels and labels["labels"].shape == real.shape):
        labels["labels"] = labels["labels"].masked_fill(~real, -100)
    results = []
    for skip in (False, True):
        model.zero_grad()
        model.skip_padding = skip
        assert _tokens_computed(model, batch) == (int(real.sum()) if skip else BATCH * LENGTH)
        out = model(**batch, **labels, output_hidden_states=True)
        loss = out.loss if head != "Model" else out.last_hidden_state[real].square().mean() + out.pooler_output.sum()
        loss.backward()
        results.append((out, loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (computed, loss, grads), (skipped, other, others) = results
    # The loss of answer spans runs over padding too, where the logits are another model's business.
    if head != "ForQuestionAnswering":
        torch.testing.assert_close(other, loss, **CLOSE)
        for one, two in zip(grads, others, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))
    for name, tensor in computed.items():
        if torch.is_tensor(tensor) and tensor.shape[:2] == real.shape:
            torch.testing.assert_close(skipped[name][real], tensor[real], **CLOSE)
            assert skipped[name][~real].eq(0).all()
    for one, two in zip(computed.hidden_states, skipped.hidden_states, strict=True):
        torch.testing.assert_close(two[real], one[real], **CLOSE)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_skipped_unasked(head):
    """Classes that show nothing of padding skip it; the others give it as transformers does."""
    model, batch = build(head), batch_for(head)
    real = int(batch["attention_mask"].sum())
    assert _tokens_computed(model, batch) == (real if head in POOLED else batch["attention_mask"].numel())
    model.skip_padding = False
    assert _tokens_computed(model, batch) == batch["attention_mask"].numel()


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
def test_training_steps_skip_unasked(head):
    """Loss and gradients stay; without labels, or in evaluation, logits at padding are transformers'."""
    model, batch = build(head).train(), batch_for(head)
    labels = labels_for(head)
    real = batch["attention_mask"].bool()
    labels["labels"] = labels["labels"].masked_fill(~real, -100)
    assert _tokens_computed(model, batch | labels) == int(real.sum())
    assert _tokens_computed(model, batch) == real.numel()
    found = []
    for skip in (None, False):
        model.skip_padding = skip
        model.zero_grad()
        loss = model(**batch, **labels).loss
        loss.backward()
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (loss, grads), (other, others) = found
    torch.testing.assert_close(loss, other, **CLOSE)
    for one, two in zip(others, grads, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))
    model.skip_padding = None
    labels["labels"][1, -1] = 1  # a label on padding
    assert _tokens_computed(model, batch | labels) == real.numel()
    assert _tokens_computed(model.eval(), batch | labels) == real.numel()


@pytest.mark.parametrize("head", POOLED)
def test_skipping_unasked_changes_no_result(head):
    model, batch = build(head), batch_for(head) | labels_for(head)
    skipped = model(**batch)
    model.skip_padding = False
    assert_outputs_close(skipped, model(**batch))


@pytest.mark.parametrize("holes", [False, True])
def test_dropout_does_not_depend_on_skipping(holes):
    """Nor where the mask leaves out tokens between others."""
    head = "ForSequenceClassification"
    model = build(head, config_of(head, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))
    model.train()
    batch, losses = batch_for(head) | labels_for(head), []
    if holes:
        batch["attention_mask"][:, 1] = 0
    for skip in (None, False):
        model.skip_padding = skip
        torch.manual_seed(1)
        losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    assert not model(**batch).loss.equal(losses[0])


@pytest.mark.parametrize("skip", [None, True])
def test_what_cannot_be_skipped_is_computed(skip):
    """Padding on the left, where the pooled token is; sequences without tokens; labels on padding."""
    model, batch = build("ForSequenceClassification"), batch_for("ForSequenceClassification")
    for mask in (batch["attention_mask"].flip(1), batch["attention_mask"] * torch.tensor([[1], [0], [1]])):
        batch["attention_mask"] = mask
        model.skip_padding = skip
        out = model(**batch)
        assert _tokens_computed(model, batch) == BATCH * LENGTH
        model.skip_padding = False
        assert_outputs_close(out, model(**batch))
    words = build("ForMaskedLM", skip_padding=True)
    batch = batch_for("ForMaskedLM")
    assert _tokens_computed(words, batch | labels_for("ForMaskedLM")) == BATCH * LENGTH


@pytest.mark.parametrize("kind", ["absolute", "relative_key"])
@pytest.mark.parametrize("extra", [0, 5])
def test_padding_changes_no_result(kind, extra):
    """A sequence alone is what it is in a batch with longer ones."""
    model = build("Model", changed(position_embedding_type=kind))
    batch = batch_for("Model", length=LENGTH)
    together = model(**batch).last_hidden_state
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        if extra:
            alone = {name: torch.nn.functional.pad(tensor, (0, extra)) for name, tensor in alone.items()}
        out = model(**alone).last_hidden_state[0, :length]
        torch.testing.assert_close(out, together[row, :length], **CLOSE)


def test_written_out_equals_fused():
    """What is asked for chooses the way attention is computed, not its result."""
    model, batch = build("Model"), batch_for("Model")
    plain = model(**batch).last_hidden_state
    for asked in (
        {"output_attentions": True},
        {"head_mask": torch.ones(4)},
        {"output_hidden_states": True},
        {"attention_mask": batch["attention_mask"][:, None, :].expand(-1, LENGTH, -1)},
    ):
        torch.testing.assert_close(model(**batch | asked).last_hidden_state, plain, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_skipped_equals_computed_on_the_device(dtype):
    model = build("Model", changed(hidden_size=128, num_attention_heads=2), skip_padding=True).to("cuda", dtype)
    batch = {name: tensor.cuda() for name, tensor in batch_for("Model").items()}
    skipped = model(**batch).last_hidden_state
    model.skip_padding = False
    real = batch["attention_mask"].bool()
    difference = (skipped - model(**batch).last_hidden_state)[real].float().abs().max()
    # A few roundings of values within about 4, by two kernels.
    assert difference < 16 * 4 * torch.finfo(dtype).eps
    assert CONFIG.num_attention_heads == 4


def test_hooks_on_word_embeddings_see_sequences():
    """So padding is not skipped while there is one, except by those that do not care for shapes."""
    model = build("ForSequenceClassification", skip_padding=True)
    batch = batch_for("ForSequenceClassification")
    expected, real = model(**batch).logits, int(batch["attention_mask"].sum())
    assert _tokens_computed(model, batch) == real < batch["input_ids"].numel()
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *hooked: seen.append(hooked[2].shape))
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    assert seen == [(*batch["input_ids"].shape, model.config.hidden_size)]
    assert _tokens_computed(model, batch) == batch["input_ids"].numel()
    hook.remove()
    model.enable_input_require_grads()
    assert _tokens_computed(model, batch) == real
