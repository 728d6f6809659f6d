"""Decoders: causal masks, caches and writing text, beside transformers and beside themselves without a cache."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_bert import MegatronBertForCausalLM
from megatron_bert.family.generation import Sampling
from parallel.errors import UserError
from tests.megatron_bert.family.support import (
    BATCH,
    CLOSE,
    CONFIG,
    LENGTH,
    assert_gradients_close,
    assert_outputs_close,
    batch_for,
    build,
    changed,
    config_of,
    labels_for,
    peer_of,
    refused,
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
    for (key, value), layer in zip(
        ours.past_key_values, theirs.past_key_values.self_attention_cache.layers, strict=True
    ):
        torch.testing.assert_close(key, layer.keys, **CLOSE)
        torch.testing.assert_close(value, layer.values, **CLOSE)
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
    kinds = [isinstance(part, tuple) and isinstance(part[0], tuple) for part in model(**batch, return_dict=False)]
    theirs = ["Cache" in type(part).__name__ for part in peer(**batch, return_dict=False)]
    assert kinds == theirs == [False, False, True, False, False, False]


def test_writing_leaves_every_module_in_its_mode():
    model = build("ForCausalLM", changed(is_decoder=True))
    model.train()
    model.bert.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    ids = torch.ones(2, 3, dtype=torch.int64)
    model.generate(ids, max_new_tokens=2, do_sample=True, top_k=None, eos_token_id=torch.tensor([1, 2]))
    with pytest.raises(UserError, match="input_ids holds 99"):
        model.generate(ids * 99, max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    for mask, reason in (([[1] * 3] * 2, "is a list"), (torch.full((2, 3), 0.5), "holds other values than 0 and 1")):
        with pytest.raises(UserError, match=f"attention_mask {reason}"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(UserError, match=r"max_new_tokens is 2\.5"):
        model.generate(ids, max_new_tokens=2.5)


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
        past = tuple(out.past_key_values) if start else out.past_key_values  # plain tuples do as well
        parts.append(out.logits)
        assert out.past_key_values.get_seq_length() == end
        if cross and start:
            encoder.pop("encoder_hidden_states", None)  # its keys and values are in the cache
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole.logits[mask.bool()], **CLOSE)


def test_a_cache_is_not_changed_and_can_be_reordered(decoder):
    ids = batch_for("ForCausalLM", ragged=False)["input_ids"]
    past = decoder(ids).past_key_values
    before = past[0][0].clone()
    decoder(ids[:, :1], past_key_values=past)
    assert past[0][0].equal(before)
    order = torch.tensor([2, 0])
    chosen = decoder(ids[order][:, :1], past_key_values=past.select(order)).logits
    torch.testing.assert_close(chosen, decoder(ids[:, :1], past_key_values=past).logits[order], **CLOSE)


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
    decoder.gradient_checkpointing_enable()
    decoder.train()
    assert decoder(**batch).past_key_values is None
    with pytest.raises(UserError, match="use_cache does not go with gradient checkpointing"):
        decoder(**batch, use_cache=True)
    decoder.gradient_checkpointing_disable()
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
    assert decoder.generate(padded, mask, max_new_tokens=6)[:, 3:].equal(decoder.generate(ids, max_new_tokens=6))


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
        generator = torch.Generator().manual_seed(seed)
        return decoder.generate(ids, do_sample=True, temperature=3.0, max_new_tokens=12, generator=generator)

    assert sample(1).equal(sample(1))
    assert not sample(1).equal(sample(2))
    greedy = decoder.generate(ids, max_new_tokens=9)
    assert decoder.generate(ids, max_new_tokens=9, do_sample=True, top_k=1).equal(greedy)
    assert decoder.generate(ids, max_new_tokens=9, do_sample=True, top_p=1e-6).equal(greedy)


WRITING = {
    "max_new_tokens": (0, 2.5, "2", None),
    "do_sample": ("yes", 2),
    "temperature": ("a", 0, -1.0, float("nan"), True, [1.0]),
    "top_k": ("a", -1, 2.5, [2]),
    "top_p": ("a", 0, 1.5, float("nan"), [0.5]),
    "generator": (7, "a"),
    "use_cache": ("yes", [1]),
    "eos_token_id": ("a", 1.5, [1, "a"], torch.tensor([1.5])),
    "pad_token_id": ("a", 1.5, -1, 91, [0]),
}


@pytest.mark.parametrize("name", WRITING)
def test_arguments_of_writing(name, decoder):
    ids = torch.ones(1, 3, dtype=torch.int64)
    for value in WRITING[name]:
        message = refused(lambda value=value: decoder.generate(ids, **{"do_sample": True, name: value}))
        assert message.startswith(f"{name} is "), message


INPUTS = {
    "list": ([[1]], None, "input_ids is a list: give a tensor"),
    "none": (None, None, "input_ids is a NoneType: give a tensor"),
    "fractions": (torch.ones(1, 2), None, "input_ids is of type torch.float32: give int64"),
    "no-tokens": (
        torch.ones(2, 0).long(),
        torch.ones(2, 0),
        "input_ids has shape [2, 0], expected [batch, tokens] with",
    ),
    "no-texts": (torch.ones(0, 2).long(), None, "input_ids has shape [0, 2], expected"),
    "meta": (torch.ones(1, 2, device="meta").long(), None, "input_ids is on meta, but the model on cpu"),
    "no-mask": (
        torch.ones(1, 2).long(),
        torch.ones(1, 0),
        "attention_mask of shape [1, 0] does not end in real tokens",
    ),
    "mask-elsewhere": (torch.ones(1, 2).long(), torch.ones(1, 2, device="meta"), "attention_mask is on meta"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_what_cannot_be_continued(case, decoder):
    ids, mask, message = INPUTS[case]
    assert refused(lambda: decoder.generate(ids, mask, max_new_tokens=2)).startswith(message)


def test_what_is_not_applied_in_writing(decoder, tmp_path):
    ids = torch.ones(1, 3, dtype=torch.int64)
    nothing = {"temperature": None, "top_k": None, "top_p": None}
    texts = [
        decoder.generate(ids, max_new_tokens=4, do_sample=True, generator=torch.Generator().manual_seed(1), **given)
        for given in (nothing, {})
    ]
    assert texts[0].equal(texts[1])
    greedy = decoder.generate(ids, max_new_tokens=4, **nothing)
    theirs = peer_of(decoder, tmp_path).generate(
        ids, attention_mask=ids, max_new_tokens=4, do_sample=False, **nothing, pad_token_id=0
    )
    assert greedy.equal(theirs)


def test_what_may_be_drawn():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    allowed = Sampling(sample=True, top_k=2).allowed(logits)
    assert allowed.isfinite().tolist() == [[False, True, False, True]]
    for share, words in ((0.35, [1]), (0.65, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        allowed = Sampling(sample=True, top_p=share).allowed(logits)
        assert allowed.isfinite()[0].nonzero().flatten().tolist() == words
    counts = torch.bincount(torch.stack([Sampling(sample=True).choose(logits)[0] for _ in range(2000)]), minlength=4)
    torch.testing.assert_close(counts / 2000, logits.exp()[0], rtol=0, atol=0.05)


def test_what_cannot_be_written(decoder):
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(UserError, match="padding of shorter texts on the left"):
        decoder.generate(ids, torch.tensor([[1, 1, 1, 1, 0]]), max_new_tokens=2)
    with pytest.raises(UserError, match="max_new_tokens is 16 after 5 tokens, but the model has 20 positions"):
        decoder.generate(ids, max_new_tokens=16)
    with pytest.raises(UserError, match=r"input_ids has shape \[5\], expected \[batch, tokens\]"):
        decoder.generate(ids[0])
    with pytest.warns(UserWarning, match="unless is_decoder=True"):
        encoder = build("ForCausalLM", config_of("ForMaskedLM"))
    with pytest.raises(UserError, match="only decoders write text"):
        encoder.generate(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MegatronBertForCausalLM(config_of("ForCausalLM"))
