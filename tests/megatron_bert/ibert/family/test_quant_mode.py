# SPDX-License-Identifier: Apache-2.0
"""Every class of both families in integers: quant_mode, quantize_model, force_dequant, freezing, ranks, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bert import IBertForMaskedLM, IBertForSequenceClassification
from megatron_bert.ibert import (
    QuantizationConfig,
    calibrate,
    freeze_ranges,
    in_mode,
    named_ranges,
    quantize_model,
    quantized_modules,
    unfreeze_ranges,
)
from parallel.errors import UserError
from parallel.mesh import SINGLE, TensorParallel
from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.support import flatten, labels_for
from tests.megatron_bert.ibert.family import support as ibert
from tests.worlds import make_tensor_parallel, run_world

#: Weights as of trained models, not as of models that are to show every mistake.
SMALL = {"initializer_range": 0.08}
CLASSES = [("MegatronBert", head) for head in megatron.HEADS] + [("IBert", head) for head in ibert.HEADS]
EACH_CLASS = pytest.mark.parametrize(("family", "head"), CLASSES, ids=lambda name: name)


def _build(family: str, head: str, *, tp: TensorParallel = SINGLE, **changes: Any) -> Any:
    room = megatron if family == "MegatronBert" else ibert
    return room.build(head, room.config_of(head, **SMALL | changes), tp=tp)


def _batch(family: str, head: str) -> dict[str, Tensor]:
    return (megatron if family == "MegatronBert" else ibert).batch_for(head) | labels_for(head)


def _quantized(family: str, head: str, **arguments: Any) -> Any:
    model = quantize_model(_build(family, head, **arguments), QuantizationConfig())
    calibrate(model, [_batch(family, head)], lambda batch: model(**batch))
    return model


def _fractions(tensor: Tensor, unit: float) -> float:
    steps = tensor.detach().double() / unit
    return float((steps - steps.round()).abs().max())


@EACH_CLASS
def test_integers_in_every_class(family, head):
    """Close to the float model, in steps of a power of two, and with gradients for every parameter."""
    model, batch = _quantized(family, head), _batch(family, head)
    output = model(**batch)
    with torch.no_grad(), in_mode(model, "float"):
        expected = flatten(model(**batch))
    for name, tensor in flatten(output).items():
        if name.startswith("past_key_values"):
            continue
        # 8 bits per matrix: 0.4 per cent of the largest input each, some tens of them one after another.
        scale = max(0.1, float(expected[name].abs().max()))
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0.1 * scale, msg=lambda t, n=name: f"{n}: {t}")
        if "logits" in name:
            assert _fractions(tensor, 2.0**-12) == 0.0
    loss = output.last_hidden_state.square().sum() + output.pooler_output.sum() if head == "Model" else output.loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if (head, name) != ("ForMultipleChoice", "classifier.bias"):  # which moves all choices alike
            assert parameter.grad.count_nonzero() > 0, name


def test_quant_mode_finds_its_ranges_in_training():
    model = _build("IBert", "ForSequenceClassification", quant_mode=True, hidden_dropout_prob=0.1)
    batch = _batch("IBert", "ForSequenceClassification")
    assert all(float(limit) == -1.0 for limit in named_ranges(model).values())
    with pytest.raises(UserError, match="before its ranges were calibrated"):
        model(**batch)
    model.train()
    model(**batch).loss.backward()
    first = {name: float(limit) for name, limit in named_ranges(model).items()}
    assert min(first.values()) > 0.0
    assert all(module.mode == "integer" and module.training for _, module in quantized_modules(model))
    with torch.no_grad():
        model.ibert.embeddings.word_embeddings.weight.mul_(3.0)
    model(**batch)
    model(**batch)
    moved = {name: float(limit) for name, limit in named_ranges(model).items()}
    place = "ibert.embeddings.ranges.sum.range"
    assert first[place] < moved[place] < 1.5 * first[place]  # by a twentieth of the way a step

    model.eval()
    logits = model(**batch).logits
    freeze_ranges(model)
    assert model.train()(**batch).logits.isfinite().all()
    model(**batch)
    assert {name: float(limit) for name, limit in named_ranges(model).items()} == moved
    assert model.eval()(**batch).logits.equal(logits)
    unfreeze_ranges(model)
    model.train()
    model(**batch)
    model(**batch)
    assert float(named_ranges(model)[place]) > moved[place]


def test_training_in_integers_learns():
    torch.manual_seed(0)
    model = IBertForSequenceClassification(ibert.config_of("ForSequenceClassification", **SMALL, quant_mode=True))
    batch = _batch("IBert", "ForSequenceClassification")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("force", "kinds"),
    [
        ("none", set()),
        ("gelu", {"gelu"}),
        ("softmax", {"softmax"}),
        ("layernorm", {"layernorm"}),
        ("nonlinear", {"gelu", "softmax", "layernorm"}),
    ],
)
def test_force_dequant(force, kinds):
    """The functions named are float ones, and only they: the result changes, and comes no further from float."""
    model = _build("IBert", "ForMaskedLM", quant_mode=True, force_dequant=force)
    batch = _batch("IBert", "ForMaskedLM")
    assert all(module.force == kinds for _, module in quantized_modules(model))
    calibrate(model, [batch], lambda batch: model(**batch))
    plain = _build("IBert", "ForMaskedLM", quant_mode=True)
    calibrate(plain, [batch], lambda batch: plain(**batch))
    with torch.no_grad():
        found, integers = model(**batch).logits, plain(**batch).logits
        with in_mode(plain, "float"):
            exact = plain(**batch).logits
    assert found.equal(integers) == (force == "none")
    assert float((found - exact).norm()) < 1.1 * float((integers - exact).norm())


@EACH_CLASS
def test_a_row_does_not_depend_on_its_batch(family, head):
    """Bit for bit: alone, with others, and with padding skipped or not."""
    if head in ("ForCausalLM", "ForMultipleChoice"):
        pytest.skip("a decoder keeps its padding, and choices stand in one row")
    model = _quantized(family, head)
    batch = {n: t for n, t in _batch(family, head).items() if n in ("input_ids", "attention_mask", "token_type_ids")}
    real = int(batch["attention_mask"][1].sum())
    outputs = []
    with torch.no_grad():
        for skip in (False, True):
            model.skip_padding = skip
            outputs.append(model(**batch)[0][1])
        outputs.append(model(**{name: tensor[1:2] for name, tensor in batch.items()})[0][0])
        outputs.append(model(**{name: tensor[1:2, :real] for name, tensor in batch.items()})[0][0])
    by_token = outputs[0].dim() == 2 or head == "ForQuestionAnswering"
    rows = [output[:real] if by_token else output for output in outputs]
    assert all(row.equal(rows[0]) for row in rows[1:])


_DIVIDED = [
    ("IBert", "ForMaskedLM"),
    ("IBert", "ForSequenceClassification"),
    ("MegatronBert", "ForPreTraining"),
    ("MegatronBert", "ForQuestionAnswering"),
]


def _run(tp: TensorParallel, ranges: dict[str, dict[str, float]] | None = None) -> dict[str, dict[str, Tensor]]:
    """Outputs in integers with given ranges or calibrated ones, and ranges that quant_mode finds in training."""
    results = {}
    for family, head in _DIVIDED:
        model, batch = _quantized(family, head, tp=tp), _batch(family, head)
        for name, limit in named_ranges(model).items():
            if ranges is not None:
                assert float(limit) == pytest.approx(ranges[family + head][name], rel=1e-5)
                limit.fill_(ranges[family + head][name])
        with torch.no_grad():
            results[family + head] = flatten(model(**batch)) | dict(named_ranges(model))
    model = _build("IBert", "ForMaskedLM", tp=tp, quant_mode=True).train()
    batch = _batch("IBert", "ForMaskedLM")
    for _ in range(2):
        model(**batch)
    results["quant_mode"] = dict(named_ranges(model))
    return {case: {name: t.detach().clone() for name, t in found.items()} for case, found in results.items()}


def _run_divided(ranges: dict[str, dict[str, float]]) -> dict[str, dict[str, Tensor]]:
    return _run(make_tensor_parallel(), ranges)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return _run(SINGLE)


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_ranks_give_identical_bits(size, expected):
    """With one set of ranges. Calibration is in floating point, so its ranges differ in their last bits."""
    ranges = {case: {n: float(t) for n, t in found.items() if t.dim() == 0} for case, found in expected.items()}
    for results in run_world(size, _run_divided, ranges):
        for case, tensors in expected.items():
            assert results[case].keys() == tensors.keys()
            for name, tensor in tensors.items():
                exact = "logits" in name or (case != "quant_mode" and name.endswith(".range"))
                close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-6}
                torch.testing.assert_close(
                    results[case][name], tensor, **close, msg=lambda t, n=f"{case} {name}": f"{n}: {t}"
                )


def test_masks_of_heads_in_integers():
    """One for all heads is that of each, whether it says 0 or is added; one of a head changes its result alone."""
    model, ids = _quantized("IBert", "ForMaskedLM"), _batch("IBert", "ForMaskedLM")["input_ids"]
    length = ids.shape[1]
    seen = (torch.arange(length) < 5)[None, None, None]
    expected = model(ids, attention_mask=seen, output_attentions=True)
    of_heads = seen.expand(1, 4, length, length)
    assert model(ids, attention_mask=of_heads).logits.equal(expected.logits)
    for hidden in (torch.finfo(torch.float32).min, -torch.inf, -1e4):
        added = torch.zeros(of_heads.shape).masked_fill(~of_heads, hidden)
        assert model(ids, attention_mask=added).logits.equal(expected.logits)
    first = torch.cat((of_heads[:, :1], torch.ones_like(of_heads[:, 1:])), dim=1)
    found = model(ids, attention_mask=first, output_attentions=True).attentions[0]
    assert found[:, 0].equal(expected.attentions[0][:, 0])
    assert found[:, 1:, :, 5:].ne(0).any()


def test_what_integers_do_not_cover():
    model = _quantized("IBert", "ForMaskedLM")
    batch = _batch("IBert", "ForMaskedLM")
    with pytest.raises(UserError, match="head_mask is given"):
        model(**batch, head_mask=torch.ones(4))
    with pytest.raises(UserError, match=r"attention_mask holds .* which integer attention does not add to its scores"):
        model(batch["input_ids"], attention_mask=torch.rand(1, 1, 1, batch["input_ids"].shape[1]))
    with pytest.raises(UserError, match=r"attention_mask holds .* which integer attention does not add to its scores"):
        model(batch["input_ids"], attention_mask=torch.full((1, 1, 1, batch["input_ids"].shape[1]), -2e3))
    hidden = torch.full((1, 1, 1, batch["input_ids"].shape[1]), -torch.inf)
    assert model(batch["input_ids"], attention_mask=hidden).logits.equal(
        model(batch["input_ids"], attention_mask=hidden == 0).logits
    )
    with pytest.raises(UserError, match="quantized already"):
        quantize_model(_build("IBert", "Model", quant_mode=True), QuantizationConfig())
    cross = {"is_decoder": True, "add_cross_attention": True}
    for changes, message in (({"position_embedding_type": "relative_key"}, "relative position"), (cross, "cross-att")):
        model = _build("MegatronBert", "Model", **changes)
        with pytest.raises(UserError, match=message):
            quantize_model(model, QuantizationConfig())
        assert list(quantized_modules(model)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["IBert", "MegatronBert"])
def test_parameters_of_sixteen_bits(family, dtype):
    """They are quantized as they are; what is carried between modules stays float32, and so does the result."""
    model, batch = _quantized(family, "ForMaskedLM"), _batch(family, "ForMaskedLM")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        expected = model(**batch).logits
        found = model.to(dtype)(**batch).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
    model.train()(**batch).loss.backward()
    assert all(parameter.grad.dtype == dtype for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_bit():
    batch = _batch("IBert", "ForMaskedLM")
    results = []
    for recompute in (False, True):
        model = _build("IBert", "ForMaskedLM", quant_mode=True, hidden_dropout_prob=0.2).train()
        if recompute:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_a_part_of_a_class_is_quantized_with_it():
    model = IBertForMaskedLM(ibert.config_of("ForMaskedLM", quant_mode=True))
    names = [name for name, _ in quantized_modules(model)]
    assert "lm_head" in names
    assert "ibert.encoder.layer.1" in names
    assert "ibert.embeddings" in names
