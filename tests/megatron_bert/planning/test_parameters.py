# SPDX-License-Identifier: Apache-2.0
"""Parameters listed without building them are those of the model."""

from __future__ import annotations

import pytest

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.flops import parameter_count
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.planning.parameters import stage_parameters
from parallel.pipeline.stage import StagePart
from tests.megatron_bert.planning.support import settings_of

#: With the 30,592 rows of the paper's vocabulary (arXiv 1909.08053, section 5.3), counted by hand from its sizes.
EXACT = {"bert_345m": 336_297_858, "bert_1.3b": 1_280_739_202, "bert_3.9b": 3_869_260_674}


@pytest.mark.parametrize("config", EXACT)
def test_counts_of_the_three_sizes(config: str) -> None:
    sizes = {"bert_345m": (1024, 24, 16), "bert_1.3b": (2048, 24, 32), "bert_3.9b": (2560, 48, 40)}[config]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    settings = settings_of(
        *(f"model.{name}={size}" for name, size in zip(names, sizes, strict=True)),
        "data.seq_length=512",
        config=config,
    )
    model = settings.model_config_for(30522, 0)
    whole = StagePart(range(model.num_hidden_layers), first=True, last=True)
    assert sum(p.local(1) for p in stage_parameters(model, whole)) == parameter_count(model) == EXACT[config]


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize(("first", "last"), [(True, True), (True, False), (False, True), (False, False)])
def test_names_shapes_and_order_are_those_of_the_modules(first: bool, last: bool, placement: str) -> None:
    config = MegatronBertConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        layer_norm_placement=placement,
    )
    layers = range(0 if first else 2, 4 if last else 2)
    part = StagePart(layers, first=first, last=last)
    model = BertForPretraining(config, part=part, device="meta")
    listed = stage_parameters(config, part)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    inside = [name for name in built if name.startswith("encoder.layers.")]
    assert {p.name: p.shape for p in listed} == built
    assert [p.name for p in listed.root] == [name for name in built if name not in inside]
    assert [p.name for layer in listed.layers for p in layer] == inside
    partial = {p.name for p in listed if p.partial}
    divided = BertForPretraining(config, part=part, device="meta", tp=_sequence_parallel())
    assert partial == {
        f"{prefix}.{name}"
        for prefix, module in divided.named_modules()
        for name in getattr(module, "token_partial", ())
    }


def _sequence_parallel():
    from parallel.mesh import TensorParallel

    return TensorParallel(size=1, sequence=True)
