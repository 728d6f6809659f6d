# SPDX-License-Identifier: Apache-2.0
"""Dropout modules: those of transformers' classes, by their names, and what is done to them has its effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from tests.megatron_bert.family import support
from tests.megatron_bert.ibert.family import support as ibert

DROPS = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.35}
FAMILIES = {"MegatronBert": support, "IBert": ibert}
CLASSES = [(family, head) for family, make in FAMILIES.items() for head in make.HEADS]


def _model(family: str, head: str, **changes):
    make = FAMILIES[family]
    return make.build(head, make.config_of(head, **DROPS | changes)), make.batch_for(head)


def _modules(model: nn.Module) -> dict[str, float]:
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


def _random(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether two passes differ."""
    torch.manual_seed(1)
    return not torch.equal(model(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize(("family", "head"), CLASSES)
def test_they_stand_where_transformers_has_them(family, head):
    cross = {"is_decoder": True, "add_cross_attention": True} if head == "ForCausalLM" else {}
    model, _ = _model(family, head, **cross)
    kind = getattr(transformers, f"{family}{head}")
    with torch.device("meta"):
        peer = kind(kind.config_class(**model.config.to_dict()))
    assert _modules(model) == _modules(peer)


def _without(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _in_evaluation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def _replaced(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout = nn.Identity()


@pytest.mark.parametrize("change", [_without, _in_evaluation, _replaced])
@pytest.mark.parametrize(("family", "head"), [("MegatronBert", "ForSequenceClassification"), *CLASSES[-4:-2]])
def test_they_can_be_switched_off(family, head, change: Callable[[nn.Module], None]):
    model, batch = _model(family, head)
    expected = model(**batch)[0]
    model.train()
    assert _random(model, batch)
    change(model)
    assert not _random(model, batch)
    torch.testing.assert_close(model(**batch)[0], expected, **support.CLOSE)


@pytest.mark.parametrize(("family", "head"), [("MegatronBert", "ForTokenClassification"), *CLASSES[-4:-2]])
def test_each_alone_has_an_effect(family, head):
    """In a model in evaluation mode too, as those do who sample from dropout."""
    model, batch = _model(family, head)
    names = _modules(model)
    for name in names:
        if ".layer.1." in name:
            continue
        module = model.get_submodule(name)
        assert not _random(model, batch)
        module.train()
        assert _random(model, batch), name
        module.eval()


def test_half_of_the_features_of_a_head_are_dropped():
    model, batch = _model("MegatronBert", "ForSequenceClassification", hidden_dropout_prob=0.0)
    model.classifier = nn.Identity()
    _without(model)
    model.train()
    expected = model(**batch).logits
    model.dropout.p = 0.5
    torch.manual_seed(1)
    dropped = torch.cat([model(**batch).logits for _ in range(20)])
    assert 0.45 < float((dropped == 0).float().mean()) < 0.55
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * expected.repeat(20, 1)[kept], **support.CLOSE)


@pytest.mark.parametrize("wrong", [nn.Dropout(1.0), nn.Dropout2d(0.1), nn.AlphaDropout(0.2)], ids=str)
def test_other_modules_in_their_place(wrong):
    model, batch = _model("MegatronBert", "Model")
    model.embeddings.dropout = wrong
    model.train()
    assert "a dropout module is " in support.refused(lambda: model(**batch))


@pytest.mark.parametrize("quantized", [False, True])
def test_quant_mode_is_an_attribute(quantized):
    for head in ("Model", "ForMaskedLM"):
        assert ibert.build(head, ibert.config_of(head, quant_mode=quantized)).quant_mode is quantized
