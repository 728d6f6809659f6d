# SPDX-License-Identifier: Apache-2.0
"""Ways to write text: the same with and without a cache, from ids and from embeddings, and in one go or in parts."""

from __future__ import annotations

import pytest
import torch

from tests.megatron_bert.family.support import BATCH, batch_for, build

WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 7},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several": {"num_beams": 4, "num_return_sequences": 3},
}
IDS = batch_for("ForCausalLM", ragged=False, length=5)["input_ids"]


@pytest.fixture(scope="module")
def decoder():
    return build("ForCausalLM")


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_changes_nothing(way, decoder):
    """Neither does padding on the left."""
    padded = torch.cat((torch.zeros(BATCH, 2, dtype=torch.int64), IDS), dim=1)
    mask = (padded != 0).long()
    written = []
    for ids, options in ((IDS, {}), (IDS, {"use_cache": False}), (padded, {"attention_mask": mask})):
        torch.manual_seed(1)
        written.append(decoder.generate(ids, max_new_tokens=6, **WAYS[way], **options)[:, ids.shape[1] :])
    assert len(written[0]) == BATCH * WAYS[way].get("num_return_sequences", 1)
    assert all(each.equal(written[0]) for each in written)


def test_parts_of_a_text(decoder):
    """What is asked for is returned for each word, and a text goes on from its cache."""
    options = {"return_dict_in_generate": True, "do_sample": False}
    out = decoder.generate(
        IDS, max_new_tokens=6, output_scores=True, output_attentions=True, output_hidden_states=True, **options
    )
    assert len(out.scores) == len(out.attentions) == len(out.hidden_states) == 6
    assert out.scores[0].shape == (BATCH, 91)
    assert out.hidden_states[1][-1].shape == (BATCH, 1, 32)
    half = decoder.generate(IDS, max_new_tokens=3, **options)
    rest = decoder.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=3, **options)
    assert rest.sequences.equal(out.sequences)


def test_other_ways_to_begin_and_to_guess(decoder):
    """From embeddings, and with words guessed from the prompt or by another model: greedy text is what it was."""
    expected = decoder.generate(IDS[:1], max_new_tokens=6)
    embedded = decoder.get_input_embeddings()(IDS[:1])
    assert decoder.generate(inputs_embeds=embedded, max_new_tokens=6).equal(expected[:, 5:])
    assert decoder.generate(IDS[:1], max_new_tokens=6, prompt_lookup_num_tokens=2).equal(expected)
    assert decoder.generate(IDS[:1], max_new_tokens=6, assistant_model=build("ForCausalLM")).equal(expected)
