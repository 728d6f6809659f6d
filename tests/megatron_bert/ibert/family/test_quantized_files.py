# SPDX-License-Identifier: Apache-2.0
"""Directories of quantized models: here bit for bit, and the ranges of transformers' quantized layers both ways."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_bert import (
    IBertForMaskedLM,
    IBertForSequenceClassification,
    MegatronBertForMaskedLM,
    MegatronBertForTokenClassification,
)
from megatron_bert.ibert import (
    QuantizationConfig,
    calibrate,
    freeze_ranges,
    named_ranges,
    quantize_model,
    quantized_modules,
    quantizers,
)
from megatron_bert.ibert.family import load_ranges, save_ranges
from megatron_bert.ibert.family.quantized import canonical_name
from megatron_bert.model.finetuning import BertForTask
from parallel.errors import UserError
from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.support import labels_for
from tests.megatron_bert.ibert.family.support import batch_for, build, config_of

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SMALL = {"initializer_range": 0.08}
HEAD = "ForMaskedLM"


@pytest.fixture
def trained():
    """A model that has found its ranges in a step of training."""
    model = build(HEAD, config_of(HEAD, **SMALL, quant_mode=True)).train()
    model(**batch_for(HEAD), **labels_for(HEAD))
    model(**batch_for(HEAD))
    return model.eval()


def test_saved_and_loaded(trained, tmp_path):
    freeze_ranges(trained)
    trained.save_pretrained(tmp_path)
    again, info = IBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.quant_mode
    assert all(quantizer.frozen for _, quantizer in quantizers(again))
    assert named_ranges(again) == named_ranges(trained)
    assert again(**batch_for(HEAD)).logits.equal(trained(**batch_for(HEAD)).logits)

    float_model = IBertForMaskedLM.from_pretrained(tmp_path, quant_mode=False)
    assert not named_ranges(float_model)
    float_model.save_pretrained(tmp_path)  # what was quantized there is gone
    assert not (tmp_path / "quantization.json").exists()
    with pytest.raises(UserError, match=r"holds no quantization\.json"):
        load_ranges(float_model, tmp_path)


def test_force_dequant_of_a_saved_model(trained, tmp_path):
    """The argument counts, not what it was saved with; and the configuration follows what quantize_model did."""
    batch = batch_for(HEAD)
    trained.save_pretrained(tmp_path)
    other = IBertForMaskedLM.from_pretrained(tmp_path, force_dequant="softmax")
    assert all(module.force == {"softmax"} for _, module in quantized_modules(other))
    assert not other(**batch).logits.equal(trained(**batch).logits)
    model = quantize_model(build(HEAD, config_of(HEAD, **SMALL)), QuantizationConfig(force_dequant="gelu"))
    calibrate(model, [batch], lambda batch: model(**batch))
    model.save_pretrained(tmp_path)
    again = IBertForMaskedLM.from_pretrained(tmp_path)
    assert (again.config.quant_mode, again.config.force_dequant) == (True, "gelu")
    assert again(**batch).logits.equal(model(**batch).logits)


def test_another_head_keeps_the_ranges_of_the_encoder(trained, tmp_path):
    freeze_ranges(trained)
    trained.save_pretrained(tmp_path)
    other = IBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    ranges = {name: float(limit) for name, limit in named_ranges(other).items()}
    expected = {name: float(limit) for name, limit in named_ranges(trained).items() if "ibert." in name}
    assert {name: ranges.pop(name) for name in expected} == expected
    assert set(ranges.values()) == {-1.0}
    head = "ForSequenceClassification"
    other.train()(**batch_for(head), **labels_for(head)).loss.backward()
    assert {name: float(named_ranges(other)[name]) for name in expected} == expected
    assert other.eval()(**batch_for(head)).logits.isfinite().all()


def test_transformers_reads_the_ranges(trained, tmp_path):
    """Its layers hold them in buffers of their own."""
    trained.save_pretrained(tmp_path)
    peer, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert peer.config.quant_mode
    assert not info["unexpected_keys"]
    layer = peer.ibert.encoder.layer[1]
    for name, act in {
        "query": layer.attention.self.query_activation,
        "context": layer.attention.self.output_activation,
        "middle": layer.attention.output.output_activation,
        "mlp_sum": layer.output.ln_input_act,
        "gelu": layer.intermediate.output_activation,
    }.items():
        limit = float(named_ranges(trained)[f"ibert.encoder.layer.1.ranges.{name}.range"])
        assert float(act.x_max) == limit, name
        assert float(act.x_min) == (pytest.approx(-0.17) if name == "gelu" else -limit), name


def test_the_ranges_of_transformers_are_taken_over(tmp_path):
    """Those its training has left in its buffers. Our heads and the sum of embeddings are still to see data."""
    source = build(HEAD, config_of(HEAD, **SMALL))
    source.save_pretrained(tmp_path / "float")
    peer = transformers.IBertForMaskedLM.from_pretrained(tmp_path / "float").train()
    batch = batch_for(HEAD)
    peer(**batch)
    peer.config.quant_mode = True
    peer.save_pretrained(tmp_path / "theirs")

    model = IBertForMaskedLM.from_pretrained(tmp_path / "theirs")
    unknown = {name for name, limit in named_ranges(model).items() if float(limit) < 0}
    in_head = {name for name in named_ranges(model) if name.startswith("lm_head.")}
    assert unknown == in_head | {"ibert.embeddings.ranges.sum.range"}
    ranges = named_ranges(model)
    act = peer.ibert.encoder.layer[0].output.output_activation
    expected = float(torch.maximum(-act.x_min, act.x_max))
    assert float(ranges["ibert.encoder.layer.0.ranges.output.range"]) == expected
    assert float(ranges["ibert.encoder.layer.1.ranges.attention_input.range"]) == expected
    calibrated = quantize_model(build(HEAD, config_of(HEAD, **SMALL)), QuantizationConfig())
    calibrate(calibrated, [batch], lambda batch: calibrated(**batch))
    for name, limit in named_ranges(calibrated).items():
        if name not in unknown:  # sums have the range of their terms too here
            rel = 0.2 if "sum" in name else 0.01
            assert float(ranges[name]) == pytest.approx(float(limit), rel=rel), name
    model.train()(**batch)
    logits = model.eval()(**batch).logits
    exact = source(**batch).logits
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.1 * float(exact.detach().abs().max()))


def test_ranges_beside_a_megatron_bert_model(tmp_path, caplog):
    head = "ForTokenClassification"
    model = quantize_model(
        megatron.build(head, megatron.config_of(head, **SMALL)),
        QuantizationConfig(
            weight_bits=7, force_dequant="softmax", layer_force_dequant={1: "gelu"}, equalization="smooth"
        ),
    )
    batch = megatron.batch_for(head)
    calibrate(model, [batch], lambda batch: model(**batch))
    model.save_pretrained(tmp_path)
    assert "save_ranges" in caplog.text
    save_ranges(model, tmp_path)
    again = MegatronBertForTokenClassification.from_pretrained(tmp_path)
    load_ranges(again, tmp_path)
    assert next(quantizers(again))[1].settings == next(quantizers(model))[1].settings
    assert again(**batch).logits.equal(model(**batch).logits)
    with pytest.raises(UserError, match="quantized already"):
        load_ranges(again, tmp_path)
    encoder = BertForTask(model.sizes, "token", model.config.num_labels)  # its names are those of checkpoints
    load_ranges(encoder, tmp_path)
    assert named_ranges(encoder) == {canonical_name(model, name): t for name, t in named_ranges(model).items()}
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert not caplog.text
    MegatronBertForTokenClassification(model.config).save_pretrained(tmp_path)  # what was quantized there is gone
    assert not (tmp_path / "quantization.json").exists()
    with pytest.raises(UserError, match="MegatronBertForMaskedLM has no ranges to save"):
        save_ranges(MegatronBertForMaskedLM(megatron.CONFIG), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("settings"),
        lambda content: content["settings"].update(color="red"),
        lambda content: content["ranges"].update(x="wide"),
        lambda content: content["ranges"].update(x=-1.0),
        lambda content: content["ranges"].update(x=float("nan")),
        lambda content: content.update(ranges=[1, 2]),
        lambda content: content["settings"].update(layer_force_dequant=3),
    ],
)
def test_damaged_files(damage, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    path = tmp_path / "quantization.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"quantization\.json is damaged"):
        IBertForMaskedLM.from_pretrained(tmp_path)
    content = {"version": 2, "settings": {"weight_bits": 9}, "ranges": {}, "frozen": True}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="weight_bits is 9: input should be 7 or 8"):
        IBertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("version", "said"), [(None, "version 1 of the integer arithmetic"), (3, "load it with a newer megatron-bert")]
)
def test_files_of_another_arithmetic(version, said, trained, tmp_path):
    """Its ranges would load, and mean something else."""
    trained.save_pretrained(tmp_path)
    path = tmp_path / "quantization.json"
    content = json.loads(path.read_text())
    assert content.pop("version") == 2
    path.write_text(json.dumps(content if version is None else content | {"version": version}))
    with pytest.raises(UserError, match=said):
        IBertForMaskedLM.from_pretrained(tmp_path)
