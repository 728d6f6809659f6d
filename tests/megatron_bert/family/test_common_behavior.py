# SPDX-License-Identifier: Apache-2.0
"""What everyone expects of any model of transformers, of every class of both families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.classes import EACH_CLASS
from tests.megatron_bert.family.support import BATCH, CLOSE, LENGTH

LANGUAGE = ("ForPreTraining", "ForMaskedLM", "ForCausalLM")


def _loss(model: Any, head: str, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a class, or something of the kind."""
    out = model(**batch, **megatron.labels_for(head))
    return out.loss if "loss" in out else out.last_hidden_state.square().mean() + out.pooler_output.mean()


def _gradients(model: Any, head: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    _loss(model, head, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@EACH_CLASS
def test_the_same_twice(make, head):
    """In evaluation always, in training with the same seed only; as a tuple what the fields hold."""
    model, batch = make.build(head, make.config_of(head, hidden_dropout_prob=0.3)), make.batch_for(head)
    options = {"output_hidden_states": True, "output_attentions": True}
    first = model(**batch, **options)
    again, listed = model(**batch, **options), model(**batch, **options, return_dict=False)
    assert all(megatron.flatten(again)[name].equal(tensor) for name, tensor in megatron.flatten(first).items())
    given = [part for part in first.to_tuple() if isinstance(part, Tensor)]
    assert all(one.equal(other) for one, other in zip(given, (p for p in listed if torch.is_tensor(p)), strict=True))
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(**batch)[0])
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


@EACH_CLASS
def test_what_is_asked_for_by_the_configuration(make, head):
    model, batch = make.build(head), make.batch_for(head)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    rows = BATCH * (megatron.CHOICES if head == "ForMultipleChoice" else 1)
    assert model(**batch).get("hidden_states") is None
    model.config.output_hidden_states = model.config.output_attentions = True
    out = model(**batch)
    assert [tuple(state.shape) for state in out.hidden_states] == [(rows, LENGTH, 32)] * (layers + 1)
    assert [tuple(each.shape) for each in out.attentions] == [(rows, heads, LENGTH, LENGTH)] * layers
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(rows, heads, LENGTH), **CLOSE)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


@EACH_CLASS
def test_gradients_reach_hidden_states_and_attentions(make, head):
    model, batch = make.build(head), make.batch_for(head)
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    kept = [*out.hidden_states, *out.attentions]
    for tensor in kept:
        tensor.retain_grad()
    out[0].square().sum().backward()
    for number, tensor in enumerate(kept):
        assert tensor.grad is not None, number
        assert tensor.grad.abs().sum() > 0, number


@EACH_CLASS
def test_rows_do_not_depend_on_their_batch(make, head):
    model, batch = make.build(head), make.batch_for(head)
    whole = model(**batch)
    for row in range(BATCH):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()})
        torch.testing.assert_close(alone[0], whole[0][row : row + 1], **CLOSE)


@EACH_CLASS
def test_embeddings_in_place_of_ids(make, head):
    model, batch = make.build(head), make.batch_for(head, ragged=False)
    if make is not megatron:  # embeddings say nothing of padding, from which positions are counted
        batch["input_ids"][..., 2] = 5
    expected = model(**batch)[0]
    given = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    embedded = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(model(**given, inputs_embeds=embedded)[0], expected, **CLOSE)


@EACH_CLASS
def test_every_parameter_learns(make, head):
    """A step of training gives every parameter a gradient, and makes the loss smaller."""
    model, batch = make.build(head).train(), make.batch_for(head)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = _loss(model, head, batch)
    before.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set()
    optimizer.step()
    assert _loss(model, head, batch) < before


@EACH_CLASS
@pytest.mark.parametrize("reentrant", [None, False, True], ids=str)
def test_gradient_checkpointing_changes_no_bit(make, head, reentrant):
    model = make.build(head, make.config_of(head, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    batch = make.batch_for(head)
    expected = _gradients(model, head, batch)
    model.activation_checkpointing_enable(*([] if reentrant is None else [{"use_reentrant": reentrant}]))
    assert model.is_activation_checkpointing
    calls: list[int] = []
    model.layer_list()[1].attention.register_forward_hook(lambda *_: calls.append(1))
    found = _gradients(model, head, batch)
    assert len(calls) == 2  # once more, not at every level
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@EACH_CLASS
def test_vocabularies_of_other_sizes(make, head):
    """Larger, smaller again and rounded up: old words keep what they have, the head follows, and the model learns."""
    model, batch = make.build(head), make.batch_for(head)
    expected, table = model(**batch), model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 101
    assert model.get_input_embeddings().weight[:91].equal(table)
    larger = model(**batch)
    name = "prediction_logits" if head == "ForPreTraining" else "logits"
    if head in LANGUAGE:
        assert larger[name].shape[-1] == 101
        assert model.get_output_embeddings().out_features == 101
        torch.testing.assert_close(larger[name][..., :91], expected[name], **CLOSE)
    else:
        torch.testing.assert_close(larger[0], expected[0], **CLOSE)
    with torch.no_grad():
        assert model(**batch | {"input_ids": torch.full_like(batch["input_ids"], 100)})[0].isfinite().all()
    model.resize_token_embeddings(91)
    torch.testing.assert_close(model(**batch)[0], expected[0], **CLOSE)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == 128
    _loss(model.train(), head, batch).backward()
    assert model.get_input_embeddings().weight.grad.shape == (128, 32)


@EACH_CLASS
def test_tied_and_untied_matrices(make, head, tmp_path):
    for tied in (True, False):
        model = make.build(head, make.config_of(head, tie_word_embeddings=tied))
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        for each in (model, loaded):
            output = each.get_output_embeddings()
            if output is None:
                assert head not in LANGUAGE
                continue
            assert (output.weight is each.get_input_embeddings().weight) == tied
            assert output.bias is each.language_head().bias
        assert loaded.num_parameters() == model.num_parameters()
        assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@EACH_CLASS
def test_tables_can_be_replaced(make, head):
    model, batch = make.build(head), make.batch_for(head)
    table = nn.Embedding(91, 32, padding_idx=model.config.pad_token_id)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    model.tie_weights()
    if head in LANGUAGE:
        assert model.get_output_embeddings().weight is table.weight
    _loss(model, head, batch).backward()
    assert table.weight.grad.abs().sum() > 0


@EACH_CLASS
def test_weights_that_no_file_has_are_drawn(make, head):
    """All of them as in a new model of the same seed, and none of those that are given."""
    config = make.config_of(head)
    torch.manual_seed(7)
    new = type(make.build(head))
    torch.manual_seed(7)
    expected = new(config)
    torch.manual_seed(7)
    drawn, info = new.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert info["missing_keys"]
    for name, tensor in drawn.state_dict().items():
        assert tensor.equal(expected.state_dict()[name]), name
    for name, parameter in expected.named_parameters():
        mean, constant = float(parameter.detach().mean()), parameter.eq(1.0).all()
        assert constant or abs(mean) < 0.2, name
    given = {name: torch.full_like(tensor, 0.5) for name, tensor in expected.state_dict().items()}
    held = new.from_pretrained(None, config=config, state_dict=given)
    assert all(bool(tensor.eq(0.5).all()) for tensor in held.state_dict().values())


@EACH_CLASS
def test_only_some_weights_are_saved(make, head, tmp_path):
    """``state_dict`` of save_pretrained: what it holds is in the file, and nothing else."""
    model = make.build(head)
    halves = {name: tensor * 0.5 for name, tensor in model.state_dict().items() if "layer.0." in name}
    model.save_pretrained(tmp_path, state_dict=halves, safe_serialization=True)
    torch.manual_seed(0)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not set(halves) & set(info["missing_keys"])
    assert info["missing_keys"]
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in halves.items())


@EACH_CLASS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(make, head, dtype):
    model, batch = make.build(head), make.batch_for(head)
    expected = model(**batch)[0]
    narrow = model.to(dtype)(**batch)[0]
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), expected, rtol=0.1, atol=0.5 if dtype == torch.bfloat16 else 0.1)
    _loss(model.train(), head, batch).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
