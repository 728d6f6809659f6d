# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters, and other things in the place of linear layers, in integer arithmetic."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from megatron_bert.ibert import QuantizationConfig, named_ranges, quantize_model, update_ranges
from megatron_bert.ibert.engine.parts import plan_of
from parallel.errors import UserError
from tests.megatron_bert.family.support import labels_for
from tests.megatron_bert.ibert.family.support import batch_for, build, config_of

SEQUENCES, WORDS = "ForSequenceClassification", "ForMaskedLM"


def _model(head: str = SEQUENCES):
    """With ranges, in evaluation."""
    model = build(head, config_of(head, initializer_range=0.08, quant_mode=True))
    model.train()(**batch_for(head))
    update_ranges(model)
    return model.eval()


def _adapted(head: str = SEQUENCES, **settings):
    torch.manual_seed(0)
    settings = {
        "task_type": "SEQ_CLS" if head == SEQUENCES else None,
        "r": 2,
        "target_modules": "all-linear",
    } | settings
    return peft.get_peft_model(_model(head), peft.LoraConfig(**settings)).eval()


def _noise(model):
    """Adapters that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize(
    ("head", "targets"),
    [(SEQUENCES, ["query", "value"]), (SEQUENCES, "all-linear"), (SEQUENCES, ["key", "dense"]), (WORDS, ["dense"])],
    ids=str,
)
def test_adapters_count_as_if_merged(head, targets):
    """To the bit; they learn, and can be switched off."""
    batch = batch_for(head)
    before = _model(head)(**batch).logits
    model = _adapted(head, target_modules=targets)
    assert model(**batch).logits.equal(before)  # lora_B begins with zeros
    _noise(model)
    model.train()(**batch, **labels_for(head)).loss.backward()
    adapters = {name: each for name, each in model.named_parameters() if "lora_" in name}
    assert all(each.grad is not None and each.grad.any() for each in adapters.values())
    assert all(".ranges." not in name for name in adapters)
    torch.optim.SGD(adapters.values(), lr=1e-2).step()
    model.eval()
    logits = model(**batch).logits
    assert not logits.equal(before)
    with model.disable_adapter():
        disabled = model(**batch).logits
    assert not disabled.equal(logits)
    model.merge_adapter()
    assert model(**batch).logits.equal(logits)
    with model.disable_adapter():  # which takes them out again, up to rounding
        torch.testing.assert_close(model(**batch).logits, disabled, rtol=0.0, atol=2e-2)
    assert model.merge_and_unload()(**batch).logits.equal(logits)


def test_disabled_adapters_are_the_base_model():
    model = _adapted()
    _noise(model)
    with model.disable_adapter():
        assert model(**batch_for(SEQUENCES)).logits.equal(_model()(**batch_for(SEQUENCES)).logits)


def test_several_adapters():
    """Those that are active count."""
    model, batch = _adapted(task_type=None), batch_for(SEQUENCES)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["query"]))
    _noise(model)
    first = model(**batch).logits
    model.base_model.set_adapter(["default", "other"])
    both = model(**batch).logits
    assert not both.equal(first)
    assert model.merge_and_unload(adapter_names=["default", "other"])(**batch).logits.equal(both)


def test_ranges_are_found_once(monkeypatch):
    """Although the head that was copied to be trained is never run."""
    model = build(SEQUENCES, config_of(SEQUENCES, initializer_range=0.08, quant_mode=True))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    batch, passes = batch_for(SEQUENCES) | labels_for(SEQUENCES), []
    monkeypatch.setattr(model, "forward", lambda *a, **k: passes.append(1) or type(model).forward(model, *a, **k))
    for _ in range(3):
        adapted.train()(**batch).loss.backward()
    assert len(passes) == 1 + 3
    before = {name: float(limit) for name, limit in named_ranges(model).items()}
    with torch.no_grad():
        model.ibert.embeddings.word_embeddings.weight.mul_(3.0)
    adapted(**batch)
    adapted(**batch)
    assert float(named_ranges(model)[place := "ibert.embeddings.ranges.sum.range"]) > before[place]  # they follow


def test_engines_get_the_adapted_weights():
    model = _adapted(WORDS, target_modules=["query", "dense"])
    _noise(model)
    base, adapted = plan_of(_model(WORDS)), plan_of(model.base_model.model)
    merged = plan_of(model.merge_and_unload())
    for plan, same in ((adapted, True), (base, False)):
        assert plan.layers[0].intermediate.weight.equal(merged.layers[0].intermediate.weight) == same
        assert plan.heads.masked.dense.weight.equal(merged.heads.masked.dense.weight) == same


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"LoRA variant \(DoraLinearVariant\).*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_dropout": 0.1}, "lora_dropout.*set it to 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_change_of_weights_is_refused(settings, message):
    model = _adapted(**settings)
    with pytest.raises(UserError, match=message):
        model.train()(**batch_for(SEQUENCES), **labels_for(SEQUENCES))


def test_other_adapters_are_refused_until_merged():
    batch = batch_for(SEQUENCES)
    settings = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(_model(), settings).eval()
    with pytest.raises(UserError, match=r"peft\.tuners\.ia3.* are not LoRA,.*merge_and_unload"):
        model(**batch)
    with model.disable_adapter():
        assert model(**batch).logits.equal(_model()(**batch).logits)
    assert not model.merge_and_unload()(**batch).logits.equal(_model()(**batch).logits)


def test_an_adapter_for_each_sample_is_refused():
    model, batch = _adapted(), batch_for(SEQUENCES)
    with pytest.raises(UserError, match="adapter_names is given"):
        model(**batch, adapter_names=["default"] * len(batch["input_ids"]))


def test_replaced_layers_are_refused():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = _model()
    model.ibert.encoder.layer[0].intermediate.dense = Doubled()
    with pytest.raises(UserError, match=r"replaced by Doubled.*put nn\.Linear back"):
        model(**batch_for(SEQUENCES))
    model = _model()
    model.ibert.encoder.layer[0].attention.self.query = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(UserError, match="replaced by Sequential"):
        model(**batch_for(SEQUENCES))


def test_adapted_models_are_not_quantized():
    model = peft.get_peft_model(build(SEQUENCES), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(UserError, match="the model has adapters: merge them first"):
        quantize_model(model.base_model.model, QuantizationConfig())


def test_no_module_of_ranges_is_named_like_a_layer():
    model = _model()
    assert not [name for name, _ in model.named_modules() if ".ranges." in name and not name.endswith("_range")]
    assert named_ranges(model).items() <= model.state_dict().items()
