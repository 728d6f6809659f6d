# SPDX-License-Identifier: Apache-2.0
"""Every class beside transformers' with the same weights: outputs, losses and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_bert import MegatronBertForMaskedLM
from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    CONFIG,
    HEADS,
    LENGTH,
    Both,
    assert_gradients_close,
    assert_outputs_close,
    assert_trains_as,
    batch_for,
    build,
    config_of,
    labels_for,
    peer_of,
)

transformers = pytest.importorskip("transformers")

PAIRS = torch.randint(0, 2, (BATCH, LENGTH, LENGTH), generator=torch.Generator().manual_seed(1))
PAIRS[:, :, 0] = 1
PAIRS[1, 2] = 0  # a token that may attend to none attends evenly to all
ALL = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(build, tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("head", HEADS)
def test_outputs_losses_and_gradients(head, ragged, both):
    model, peer = both(head)
    assert_trains_as(model, peer, batch_for(head, ragged=ragged) | labels_for(head))


@pytest.mark.parametrize("head", HEADS)
def test_everything_it_returns(head, both):
    model, peer = both(head)
    batch = batch_for(head)
    ours, theirs = model(**batch, **ALL), peer(**batch, **ALL)
    assert_outputs_close(ours, theirs)
    assert len(ours.hidden_states) == CONFIG.num_hidden_layers + 1
    assert [name for name in ours if name != "past_key_values"] == [n for n in theirs if n != "past_key_values"]
    as_tuple = model(**batch, **ALL, **labels_for(head), return_dict=False)
    expected = peer(**batch, **ALL, **labels_for(head), return_dict=False)
    assert [type(part) for part in as_tuple if torch.is_tensor(part)] == [
        type(part) for part in expected if torch.is_tensor(part)
    ]
    torch.testing.assert_close(as_tuple[0], expected[0], **CLOSE)
    torch.testing.assert_close(as_tuple[-1][-1], expected[-1][-1], **CLOSE)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_masks_of_pairs(head, both):
    model, peer = both(head)
    batch = batch_for(head) | {"attention_mask": PAIRS}
    # transformers 5 takes masks of pairs with an axis for heads only, and as what is added to scores.
    added = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(PAIRS[:, None] == 0, torch.finfo(torch.float32).min)
    assert_outputs_close(model(**batch), peer(**batch | {"attention_mask": added}))


def test_rows_without_any_token(both):
    model, peer = both("Model")
    batch = batch_for("Model")
    batch["attention_mask"][1] = 0
    assert_outputs_close(model(**batch), peer(**batch))


def test_no_mask_and_no_types(both):
    model, peer = both("Model")
    ids = batch_for("Model", ragged=False)["input_ids"]
    assert_outputs_close(model(ids), peer(ids))


@pytest.mark.parametrize("rows", [1, BATCH])
def test_positions(rows, both):
    model, peer = both("Model")
    positions = torch.randint(0, 20, (rows, LENGTH))
    batch = batch_for("Model") | {"position_ids": positions}
    assert_outputs_close(model(**batch), peer(**batch))


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForMultipleChoice"])
def test_embeddings_in_place_of_words(head, both):
    model, peer = both(head)
    batch = batch_for(head)
    embeds = torch.randn(*batch.pop("input_ids").shape, CONFIG.hidden_size)
    mine, yours = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    ours, theirs = model(inputs_embeds=mine, **batch), peer(inputs_embeds=yours, **batch)
    assert_outputs_close(ours, theirs)
    ours[0].square().sum().backward()
    theirs[0].square().sum().backward()
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5 * float(yours.grad.abs().max()))


@pytest.mark.parametrize(
    ("labels", "classes", "problem"),
    [
        (torch.randn(BATCH), 1, None),
        (torch.randn(BATCH, 5), 5, "regression"),
        (torch.tensor([0, 4, 2]), 5, None),
        (torch.tensor([[1.0, 0, 0, 1, 0]]).repeat(BATCH, 1), 5, None),
    ],
    ids=["regression", "regression-of-several", "single-label", "multi-label"],
)
def test_problem_types(labels, classes, problem, tmp_path):
    head = "ForSequenceClassification"
    model = build(head, config_of(head, num_labels=classes, problem_type=problem))
    peer = peer_of(model, tmp_path)
    assert_trains_as(model, peer, batch_for(head) | {"labels": labels})


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_activations_and_untied_outputs(act, tied, tmp_path):
    model = build("ForMaskedLM", config_of("ForMaskedLM", hidden_act=act, tie_word_embeddings=tied))
    peer = peer_of(model, tmp_path)
    assert_trains_as(model, peer, batch_for("ForMaskedLM") | labels_for("ForMaskedLM"))


@pytest.mark.parametrize("act", ["relu", "silu", "swish"])
def test_directories_of_transformers_with_other_activations(act, tmp_path):
    torch.manual_seed(3)
    sizes = {"vocab_size": CONFIG.vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MegatronBertConfig(**sizes, intermediate_size=64, hidden_act=act, initializer_range=0.2)
    peer = transformers.MegatronBertForMaskedLM(config).eval()
    peer.save_pretrained(tmp_path)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    assert model.config.hidden_act == act
    assert_trains_as(model, peer, batch_for("ForMaskedLM") | labels_for("ForMaskedLM"))


def test_padding_gets_no_gradient_from_where_it_is_looked_up(both):
    model, peer = both("Model")
    ids = batch_for("Model", ragged=False)["input_ids"]
    ids[:, 2] = CONFIG.pad_token_id
    for each in (model, peer):
        each(ids).last_hidden_state.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[CONFIG.pad_token_id].eq(0).all()
    assert_gradients_close(model, peer)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_without_padding_every_row_gets_its_gradient(head, tmp_path):
    model = build(head, config_of(head, pad_token_id=None))
    peer = peer_of(model, tmp_path)
    assert peer.get_input_embeddings().padding_idx is None
    batch = batch_for(head, ragged=False)
    batch["input_ids"][:, 2] = 0
    assert_trains_as(model, peer, batch | labels_for(head))
    assert model.get_input_embeddings().weight.grad[0].abs().max() > 1e-3


def test_embeddings_of_a_narrower_type(both):
    model, peer = both("Model")
    batch = {"inputs_embeds": torch.randn(2, 4, CONFIG.hidden_size).to(torch.bfloat16)}
    assert_outputs_close(model(**batch), peer(**batch))


def test_more_tokens_than_positions(both):
    """Positions that are given may repeat."""
    model, peer = both("Model")
    batch = {"input_ids": torch.arange(2 * 30).view(2, 30) % 91, "position_ids": torch.arange(30)[None] // 2}
    assert_outputs_close(model(**batch), peer(**batch))


def test_gradient_checkpointing_changes_no_bit(both):
    model, _ = both("ForMaskedLM")
    batch = batch_for("ForMaskedLM") | labels_for("ForMaskedLM")
    model.train()
    results = []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        for extra in ({}, ALL):
            model.zero_grad()
            model(**batch, **extra).loss.backward()
            results.append([p.grad.clone() for p in model.parameters()])
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert all(a.equal(b) for a, b in zip(results[0], results[2], strict=True))
    assert all(a.equal(b) for a, b in zip(results[1], results[3], strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_random_configurations(seed, tmp_path):
    """Sizes, activation, ties and class at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    head = list(HEADS)[1:][int(torch.randint(len(HEADS) - 1, (1,), generator=generator))]
    heads = pick(1, 2, 3, 6)
    config = config_of(
        head,
        hidden_size=heads * pick(4, 8, 10),
        num_attention_heads=heads,
        num_hidden_layers=pick(1, 2, 4),
        intermediate_size=pick(24, 50),
        type_vocab_size=pick(2, 3),
        hidden_act=pick("gelu", "gelu_new", "relu", "silu"),
        layer_norm_eps=pick(1e-12, 1e-5),
        vocab_size_multiple=pick(1, 32, 128),
        pad_token_id=pick(0, 3),
    )
    model = build(head, config)
    peer = peer_of(model, tmp_path)
    assert_trains_as(model, peer, batch_for(head) | labels_for(head))
