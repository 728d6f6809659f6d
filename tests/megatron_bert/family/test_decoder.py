# SPDX-License-Identifier: Apache-2.0
"""Decoders: causal masks, caches and writing text, beside transformers and beside themselves without a cache."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers.cache_utils import StaticSlidingWindowLayer

from megatron_bert import MegatronBertForCausalLM
from parallel.errors import UserError
from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    CONFIG,
    LENGTH,
    as_tuples,
    assert_gradients_close,
    assert_outputs_close,
    batch_for,
    build,
    changed,
    config_of,
    labels_for,
    peer_of,
)

CROSS = {"is_decoder": True, "add_cross_attention": True}


@pytest.fixture(scope="module")
def decoder():
    return build("ForCausalLM")


def test_cross_attention_like_transformers(tmp_path):
    """For an encoder as long as the decoder: transformers takes no other."""
    model = build("ForCausalLM", changed(**CROSS))
    peer = peer_of(model, tmp_path)
    batch = batch_for("ForCausalLM") | labels_for("ForCausalLM")
    batch |= {
        "encoder_hidden_states": torch.randn(BATCH, LENGTH, CONFIG.hidden_size),
        "encoder_attention_mask": batch["attention_mask"],
    }
    ours = model(**batch, output_attentions=True)
    theirs = peer(**batch, output_attentions=True)
    assert_outputs_close(ours, theirs)
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_close(model, peer)


def test_caches_hold_what_transformers_keeps(decoder, tmp_path):
    peer = peer_of(decoder, tmp_path)
    batch = batch_for("ForCausalLM", ragged=False)
    ours, theirs = decoder(**batch, use_cache=True), peer(**batch, use_cache=True)
    for mine, layer in zip(as_tuples(ours.past_key_values), as_tuples(theirs.past_key_values), strict=True):
        torch.testing.assert_close(mine, layer, **CLOSE)
    more = torch.tensor([[3, 4], [5, 6], [7, 8]])
    theirs = peer(input_ids=more, past_key_values=theirs.past_key_values)
    torch.testing.assert_close(decoder(more, past_key_values=ours.past_key_values).logits, theirs.logits, **CLOSE)


def test_parts_stand_where_transformers_has_them(tmp_path):
    """The cache is after the hidden states by place and before them in a tuple."""
    model = build("Model", changed(is_decoder=True, add_cross_attention=True))
    peer = peer_of(model, tmp_path)
    batch = batch_for("Model", ragged=False) | {"output_hidden_states": True, "output_attentions": True}
    batch["encoder_hidden_states"] = torch.randn(*batch["input_ids"].shape, 32)
    assert list(model(**batch)) == list(peer(**batch))
    kinds = ["Cache" in type(part).__name__ for part in model(**batch, return_dict=False)]
    theirs = ["Cache" in type(part).__name__ for part in peer(**batch, return_dict=False)]
    assert kinds == theirs == [False, False, True, False, False, False]


def test_writing_leaves_every_module_in_its_mode():
    model = build("ForCausalLM", changed(is_decoder=True))
    model.train()
    model.bert.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    ids = torch.ones(2, 3, dtype=torch.int64)
    model.generate(ids, max_new_tokens=2, do_sample=True, eos_token_id=[1, 2])
    with pytest.raises(UserError, match="input_ids holds 99"):
        model.generate(ids * 99, max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_writing_without_a_padding_token():
    """What follows an end is the end again, as transformers has it."""
    model = build("ForCausalLM", changed(is_decoder=True, pad_token_id=None))
    ids = torch.arange(4).view(2, 2)
    free = model.generate(ids, max_new_tokens=4)
    ended = model.generate(ids, max_new_tokens=4, eos_token_id=int(free[0, 2]))
    assert ended[0, 2:].eq(free[0, 2]).all()


@pytest.mark.parametrize("kind", ["absolute", "relative_key", "relative_key_query"])
@pytest.mark.parametrize("cross", [False, True], ids=["alone", "cross"])
def test_cached_decoding_equals_uncached(cross, kind):
    model = build("ForCausalLM", changed(**(CROSS if cross else {"is_decoder": True}), position_embedding_type=kind))
    batch = batch_for("ForCausalLM", ragged=False)
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    mask[1, :2] = 0  # padding on the left
    encoder = {}
    if cross:
        encoder["encoder_hidden_states"] = torch.randn(BATCH, 5, CONFIG.hidden_size)
        encoder["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]])
    whole = model(ids, mask, **encoder)
    past, parts = None, []
    for start, end in ((0, 4), (4, 5), (5, LENGTH)):
        out = model(ids[:, start:end], mask[:, :end], past_key_values=past, **encoder)
        past = out.past_key_values
        parts.append(out.logits)
        assert out.past_key_values.get_seq_length() == end
        if start:
            past = as_tuples(past)  # as transformers 4 had them
        if cross and start:
            encoder.pop("encoder_hidden_states", None)  # its keys and values are in the cache
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole.logits[mask.bool()], **CLOSE)


def test_a_cache_grows_and_can_be_reordered(decoder):
    """As transformers' caches: in place, by rows for beams, and a copy stays as it is."""
    ids = batch_for("ForCausalLM", ragged=False)["input_ids"]
    with torch.no_grad():
        past = decoder(ids).past_key_values
    kept, order = copy.deepcopy(past), torch.tensor([2, 0, 1])
    out = decoder(ids[:, :1], past_key_values=past)
    assert out.past_key_values is past
    assert (past.get_seq_length(), kept.get_seq_length()) == (LENGTH + 1, LENGTH)
    kept.reorder_cache(order)
    torch.testing.assert_close(decoder(ids[order][:, :1], past_key_values=kept).logits, out.logits[order], **CLOSE)


def test_caches_of_a_fixed_size(decoder, tmp_path):
    """Room for tokens to come counts for nothing, with and without a mask; in forward passes and in ``generate``."""
    peer, ids = peer_of(decoder, tmp_path), batch_for("ForCausalLM", ragged=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for given in ({}, {"attention_mask": mask}):
        expected = decoder(ids, **given).logits
        for model in (decoder, peer):
            past, parts = transformers.StaticCache(config=model.config, max_cache_len=15), []
            for start, end in ((0, 4), (4, 5), (5, LENGTH)):
                masked = {name: whole[:, :end] for name, whole in given.items()}
                out = model(ids[:, start:end], past_key_values=past, **masked)
                assert out.past_key_values is past
                parts.append(out.logits)
            counted = given.get("attention_mask", torch.ones_like(ids)).bool()
            torch.testing.assert_close(torch.cat(parts, dim=1)[counted], expected[counted], **CLOSE)
    for options in ({"num_beams": 3}, {"num_beams": 1}):
        plain = decoder.generate(ids[:, :5], max_new_tokens=6, **options)
        for model in (decoder, peer):
            fixed = model.generate(ids[:, :5], max_new_tokens=6, cache_implementation="static", **options)
            assert fixed.equal(plain)
    sliding = transformers.StaticCache(config=decoder.config, max_cache_len=20)
    sliding.layers = [StaticSlidingWindowLayer(max_cache_len=20, sliding_window=4) for _ in sliding.layers]
    with pytest.raises(UserError, match="layers of StaticSlidingWindowLayer, which keep the last tokens alone"):
        decoder(ids, past_key_values=sliding)


def test_tokens_before_those_of_an_encoder(tmp_path):
    """As prefix tuning puts them there: keys and values that come from elsewhere, and a mask that counts them."""
    model = build("ForTokenClassification")
    peer = peer_of(model, tmp_path)
    batch = batch_for("ForTokenClassification", length=6)
    prefix = [tuple(torch.randn(2, BATCH, 4, 5, 8)) for _ in range(CONFIG.num_hidden_layers)]
    batch["attention_mask"] = torch.cat((torch.ones(BATCH, 5, dtype=torch.int64), batch["attention_mask"]), dim=1)
    states = peer.bert(**batch, past_key_values=transformers.DynamicCache(prefix)).last_hidden_state
    torch.testing.assert_close(
        model.bert(**batch, past_key_values=transformers.DynamicCache(prefix)).last_hidden_state, states, **CLOSE
    )


def test_logits_to_keep(decoder):
    batch = batch_for("ForCausalLM", ragged=False)
    whole = decoder(**batch).logits
    torch.testing.assert_close(decoder(**batch, logits_to_keep=2).logits, whole[:, -2:], **CLOSE)
    places = torch.tensor([0, 3])
    torch.testing.assert_close(decoder(**batch, logits_to_keep=places).logits, whole[:, places], **CLOSE)


def test_when_a_cache_is_returned(decoder):
    batch = batch_for("ForCausalLM")
    assert decoder(**batch, use_cache=False).past_key_values is None
    assert decoder(**batch, **labels_for("ForCausalLM")).past_key_values is None
    assert decoder(**batch).past_key_values is not None
    decoder.activation_checkpointing_enable()
    decoder.train()
    assert decoder(**batch).past_key_values is None
    with pytest.raises(UserError, match="use_cache does not go with gradient checkpointing"):
        decoder(**batch, use_cache=True)
    decoder.activation_checkpointing_disable()
    decoder.eval()


def test_greedy_text_is_that_of_transformers(decoder, tmp_path):
    peer = peer_of(decoder, tmp_path)
    ids = batch_for("ForCausalLM", ragged=False, length=5)["input_ids"]
    expected = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert decoder.generate(ids, max_new_tokens=10).equal(expected)
    assert decoder.generate(ids, max_new_tokens=10, use_cache=False).equal(expected)
    assert not decoder.training


def test_padding_on_the_left_changes_no_text(decoder):
    ids = batch_for("ForCausalLM", ragged=False, length=4)["input_ids"]
    padded = torch.cat((torch.zeros(BATCH, 3, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(7) >= 3).long().expand(BATCH, -1)
    assert decoder.generate(padded, attention_mask=mask, max_new_tokens=6)[:, 3:].equal(
        decoder.generate(ids, max_new_tokens=6)
    )


def test_text_ends(decoder):
    ids = batch_for("ForCausalLM", ragged=False, length=5)["input_ids"]
    free = decoder.generate(ids, max_new_tokens=6)[:, 5:]
    end = int(free[0, 2])
    ended = decoder.generate(ids, max_new_tokens=6, eos_token_id=[end, 90_000], pad_token_id=7)[:, 5:]
    for row, before in zip(ended, free, strict=True):
        at = (before == end).nonzero().flatten().tolist()
        stop = at[0] + 1 if at else 6
        assert row[:stop].equal(before[:stop])
        assert row[stop:].eq(7).all()
    one = decoder.generate(ids[:1], max_new_tokens=6, eos_token_id=int(free[0, 0]))
    assert one.shape[1] == 6


def test_sampled_text_repeats_with_its_generator(decoder):
    ids = batch_for("ForCausalLM", ragged=False, length=3)["input_ids"]

    def sample(seed):
        torch.manual_seed(seed)
        return decoder.generate(ids, do_sample=True, temperature=3.0, max_new_tokens=12)

    assert sample(1).equal(sample(1))
    assert not sample(1).equal(sample(2))
    greedy = decoder.generate(ids, max_new_tokens=9)
    assert decoder.generate(ids, max_new_tokens=9, do_sample=True, top_k=1).equal(greedy)
    assert decoder.generate(ids, max_new_tokens=9, do_sample=True, top_p=1e-6).equal(greedy)


def test_what_cannot_be_written(decoder):
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.warns(UserWarning, match="unless is_decoder=True"):
        encoder = build("ForCausalLM", config_of("ForMaskedLM"))
    with pytest.raises(UserError, match="only decoders write text"):
        encoder.generate(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MegatronBertForCausalLM(config_of("ForCausalLM"))
