# SPDX-License-Identifier: Apache-2.0
"""Everything public that transformers' base classes have is here, and what its own models answer."""

from __future__ import annotations

import pytest
import torch
import transformers

import megatron_bert
from tests.megatron_bert.family.support import batch_for, build
from tests.megatron_bert.ibert.family import support as ibert

CLASSES = [name for name in megatron_bert.__all__ if name.startswith(("MegatronBert", "IBert"))]

#: What transformers' classes have and these do not, with the reason.
MISSING = {"chunk_size_feed_forward": "skipping padding and gradient checkpointing save memory, and cost less time"}


def _public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_public_is_missing(name):
    kind, theirs = getattr(megatron_bert, name), getattr(transformers, name)
    base = transformers.PreTrainedConfig if name.endswith("Config") else transformers.PreTrainedModel
    assert _public(base) <= _public(kind)
    # All that transformers' class of the same name says of itself, and what it takes.
    assert _public(theirs) - _public(kind) <= MISSING.keys()
    if kind.__name__ == "MegatronBertForCausalLM":
        assert _public(transformers.GenerationMixin) <= _public(kind)
    if not name.endswith("Config"):
        assert kind.main_input_name == theirs.main_input_name == "input_ids"
        assert kind.base_model_prefix == theirs.base_model_prefix
        assert kind.supports_gradient_checkpointing
        assert kind.can_generate() == theirs.can_generate()


@pytest.mark.parametrize("make", [build, ibert.build], ids=["MegatronBert", "IBert"])
def test_what_tools_ask_of_a_model(make, tmp_path):
    model = make("ForMaskedLM")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()
    assert model.base_model is getattr(model, model.base_model_prefix)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    model.enable_input_require_grads()
    model.requires_grad_(False)
    model.activation_checkpointing_enable()
    batch = batch_for("ForMaskedLM")
    ids = {"input_ids": batch["input_ids"].clamp(min=2), "attention_mask": batch["attention_mask"]}
    assert model.train()(**ids, labels=ids["input_ids"]).loss.requires_grad
    model.disable_input_require_grads()
    model.config.architectures = [type(model).__name__]
    assert model.config.to_diff_dict()["hidden_size"] == 32
    model.add_model_tags("tagged")
    other = type(model)._from_config(model.config, dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
    with pytest.raises(ValueError, match="Flash Attention"):
        type(model)._from_config(model.config, attn_implementation="flash_attention_2")


def test_eager_attention_gives_what_the_fused_one_gives():
    model, batch = build("ForMaskedLM"), batch_for("ForMaskedLM")
    expected = model(**batch).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
