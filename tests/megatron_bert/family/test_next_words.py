# SPDX-License-Identifier: Apache-2.0
"""logits_to_keep and num_items_in_batch of the model that predicts next words, beside transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    LENGTH,
    Both,
    batch_for,
    build,
    config_of,
    labels_for,
    peer_of,
    refused,
)

transformers = pytest.importorskip("transformers")

MARKS = torch.arange(LENGTH) % 2 == 0


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(build, tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize(
    "kept",
    [
        0,
        1,
        LENGTH + 1,
        -1,
        -LENGTH,
        True,
        torch.tensor(2),
        torch.tensor(-1),
        torch.tensor([0, 2]),
        torch.tensor([-LENGTH, -1], dtype=torch.int32),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([[0, 1], [-1, 3], [2, 2]]),
        MARKS,
        torch.zeros(LENGTH, dtype=torch.bool),
        MARKS[None].logical_xor(torch.tensor([[True], [False], [True]])),
    ],
    ids=str,
)
def test_kept_logits(kept, both):
    model, peer = both("ForCausalLM")
    ids = batch_for("ForCausalLM", ragged=False)["input_ids"]
    ours, theirs = (each(ids, logits_to_keep=kept).logits for each in (model, peer))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    labels = labels_for("ForCausalLM")
    # The loss is that of all words whatever is kept.
    torch.testing.assert_close(model(ids, logits_to_keep=kept, **labels).loss, peer(ids, **labels).loss, **CLOSE)


KEPT = {
    "fraction": (1.5, "logits_to_keep is 1.5: give a number of tokens"),
    "nothing": (None, "logits_to_keep is None: give"),
    "text": ("last", "logits_to_keep is 'last': give"),
    "list": ([0, 2], "logits_to_keep is [0, 2]: give"),
    "long-array": (np.arange(40), "logits_to_keep is a ndarray: give"),
    "fractions": (torch.tensor([1.0]), "logits_to_keep is of type torch.float32"),
    "bytes": (torch.ones(LENGTH, dtype=torch.uint8), "logits_to_keep is of type torch.uint8"),
    "complex": (torch.tensor([1j]), "logits_to_keep is of type torch.complex64"),
    "sparse": (torch.tensor([1]).to_sparse(), "logits_to_keep is a sparse tensor"),
    "meta": (torch.tensor([1], device="meta"), "logits_to_keep is of type torch.int64 on meta"),
    "one-mark": (torch.tensor(True), "logits_to_keep has shape [] and type torch.bool, expected [9] or [3, 9]"),
    "few-marks": (MARKS[:4], "logits_to_keep has shape [4] and type torch.bool, expected [9] or [3, 9]"),
    "more-rows": (
        torch.ones(4, 2, dtype=torch.int64),
        "logits_to_keep has shape [4, 2], expected [places] or [3, places]",
    ),
    "deep": (torch.ones(3, 2, 2, dtype=torch.int64), "logits_to_keep has shape [3, 2, 2], expected"),
    "beyond": (torch.tensor([0, LENGTH]), "logits_to_keep holds places outside of 9 tokens: give 0 to 8, or -9 to -1"),
    "before": (torch.tensor(-LENGTH - 1), "logits_to_keep holds places outside of 9 tokens"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_cannot_be_kept(case):
    kept, message = KEPT[case]
    assert message in refused(lambda: build("ForCausalLM")(batch_for("ForCausalLM")["input_ids"], logits_to_keep=kept))


@pytest.mark.parametrize("items", [None, 7, 2.5, torch.tensor(40)], ids=str)
def test_losses_of_steps_of_several_batches(items, both):
    model, peer = both("ForCausalLM")
    batch = batch_for("ForCausalLM") | labels_for("ForCausalLM")
    for each in (model, peer):
        each(**batch, num_items_in_batch=items).loss.backward()
    ours, theirs = (each(**batch, num_items_in_batch=items).loss for each in (model, peer))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours, theirs = (each.get_input_embeddings().weight.grad for each in (model, peer))
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "items", [-1, True, "a", float("nan"), float("inf"), torch.ones(2), torch.ones((), device="meta"), [3]], ids=str
)
def test_numbers_of_words_that_are_none(items):
    batch = batch_for("ForCausalLM") | labels_for("ForCausalLM")
    message = refused(lambda: build("ForCausalLM")(**batch, num_items_in_batch=items))
    assert message.startswith("num_items_in_batch is ")


def test_no_words_of_steps_of_several_batches():
    model, batch = build("ForCausalLM"), batch_for("ForCausalLM")
    ignored = torch.full((BATCH, LENGTH), -100)
    assert float(model(**batch, labels=ignored, num_items_in_batch=0).loss.detach()) == 0.0
    labels = labels_for("ForCausalLM")
    assert "num_items_in_batch is 0, but" in refused(lambda: model(**batch, **labels, num_items_in_batch=0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_items_in_batch'"):
        build("ForMaskedLM")(**batch, num_items_in_batch=3)


def test_the_trainer_of_transformers(tmp_path):
    """Two batches a step, with other numbers of words, and every second layer recomputed."""
    pytest.importorskip("accelerate")
    model = build("ForCausalLM", config_of("ForCausalLM", num_hidden_layers=3))
    peer = peer_of(model, tmp_path / "peer")
    batch = batch_for("ForCausalLM", ragged=False) | labels_for("ForCausalLM")
    batch["labels"][0, 2:] = -100
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(BATCH)] * 2
    losses = []
    for each in (model, peer):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"every_n_layers": 2},
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=each, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert [layer.gradient_checkpointing for layer in model.layer_list()] == [True, False, True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 2
