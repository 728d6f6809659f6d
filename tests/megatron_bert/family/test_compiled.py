# SPDX-License-Identifier: Apache-2.0
"""Export, ONNX and compilation, dynamic quantization, copies and the meta device."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import megatron_bert
from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.classes import CLASSES, NAMES
from tests.megatron_bert.family.support import CLOSE, batch_for, build, labels_for
from tests.megatron_bert.ibert.family import support as ibert


def _small(make, head, layers=2, **arguments):
    """Two layers: what is captured of each is captured again in the next, and captures take long."""
    return make.build(head, make.config_of(head, num_hidden_layers=layers), **arguments)


def _inputs(make, head):
    batch = make.batch_for(head)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _dynamic(inputs):
    """Batch and length may be others; the number of choices stays."""
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=18)
    return {name: {0: batch, tensor.dim() - 1: length} for name, tensor in inputs.items()}


#: I-BERT's exports differ in the positions and the head, so some of them are enough for a quick look.
_QUICK = ("IBertModel", "IBertForMultipleChoice")
EXPORTED = [
    pytest.param(*case, id=name, marks=[] if name in _QUICK or case[0] is megatron else [pytest.mark.slow])
    for name, case in zip(NAMES, CLASSES, strict=True)
]


@pytest.mark.parametrize(("make", "head"), EXPORTED)
def test_exported_classes_take_any_batch_and_length(make, head):
    model, inputs = _small(make, head), _inputs(make, head)
    model.config.use_cache = False
    program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=_dynamic(inputs))
    for given in (inputs, {name: tensor[:2, ..., :5] for name, tensor in inputs.items()}):
        expected, found = model(**given), program.module()(**given)
        torch.testing.assert_close(found[0], expected[0], **CLOSE)


def _padded(batch, length):
    """Words, and a mask under which each sequence is shorter than the one before."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    return ids, (torch.arange(length) < length - 2 * torch.arange(batch)[:, None]).long()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False], ids=["all-ones", "padded"])
@pytest.mark.parametrize(
    ("make", "head"),
    [
        (megatron, "ForSequenceClassification"),
        (megatron, "ForMaskedLM"),
        (megatron, "ForCausalLM"),
        (ibert, "ForSequenceClassification"),
    ],
    ids=["MegatronBertForSequenceClassification", "ForMaskedLM", "ForCausalLM", "IBertForSequenceClassification"],
)
def test_traced_classes_take_any_mask_batch_and_length(make, head, whole):
    """No choice by what the mask of the example holds is in the trace; padding may be skipped outside of it."""
    model = _small(make, head, skip_padding=True)
    model.config.use_cache, model.config.return_dict = False, False
    ids, mask = _padded(2, 9)
    traced = torch.jit.trace(model, (ids, torch.ones_like(mask) if whole else mask), strict=False, check_trace=False)
    model.skip_padding = False
    for shape in ((2, 9), (4, 9), (3, 7), (2, 12), (1, 1)):
        given = _padded(*shape)
        torch.testing.assert_close(traced(*given)[0], model(*given)[0], **CLOSE)
    ids, mask = _padded(3, 8)
    assert not traced(ids, mask)[0].allclose(traced(ids, torch.ones_like(mask))[0], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_onnx_by_tracing_keeps_the_mask(tmp_path):
    import onnxruntime

    model = _small(megatron, "ForSequenceClassification")
    model.config.return_dict = False
    ids, mask = _padded(2, 9)
    path, names = tmp_path / "model.onnx", ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    options = {"dynamo": False, "input_names": names, "dynamic_axes": axes}
    torch.onnx.export(model, (ids, torch.ones_like(mask)), path, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 9), (3, 7)):
        given = _padded(*shape)
        (found, *_) = session.run(None, dict(zip(names, map(np.asarray, given), strict=True)))
        torch.testing.assert_close(torch.from_numpy(found), model(*given)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["MegatronBert", "IBert"])
def test_onnx_gives_equal_logits(family, tmp_path):
    import onnxruntime

    make = megatron if family == "MegatronBert" else ibert
    model, inputs = _small(make, "ForSequenceClassification"), _inputs(make, "ForSequenceClassification")
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), path, kwargs=inputs, dynamic_shapes=_dynamic(inputs), dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for given in (inputs, {name: tensor[:2, :5] for name, tensor in inputs.items()}):
        (found, *_) = session.run(None, {name: np.asarray(tensor) for name, tensor in given.items()})
        torch.testing.assert_close(torch.from_numpy(found), model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "layers"), [("ForMaskedLM", 2), ("ForSequenceClassification", 1)])
def test_training_compiles_as_one_graph(head, layers):
    model, batch = _small(megatron, head, layers).train(), batch_for(head) | labels_for(head)
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["ForPreTraining", "ForQuestionAnswering"])
def test_losses_of_two_labels_compile_as_one_graph(head):
    model, batch = _small(megatron, head, layers=1).train(), batch_for(head) | labels_for(head)
    loss = torch.compile(model, fullgraph=True, backend="eager")(**batch).loss
    torch.testing.assert_close(loss, model(**batch).loss, **CLOSE)


@pytest.mark.parametrize("family", ["MegatronBert", "IBert"])
def test_copies_are_equal_and_independent(family):
    make = megatron if family == "MegatronBert" else ibert
    model, batch = make.build("ForMaskedLM"), make.batch_for("ForMaskedLM")
    expected = model(**batch).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert other(**batch).logits.equal(expected)
        assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
        with torch.no_grad():
            other.get_input_embeddings().weight.zero_()
    assert model(**batch).logits.equal(expected)


def test_shapes_alone_are_enough():
    """In a FakeTensorMode, as tools that only want shapes use it."""
    model, batch = build("ForMaskedLM", skip_padding=True), batch_for("ForMaskedLM")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        out = model(**{name: fake.from_tensor(tensor) for name, tensor in batch.items()})
    assert out.logits.shape == (3, 9, 91)


def test_the_meta_device():
    with torch.device("meta"):
        model = megatron_bert.MegatronBertForMaskedLM(megatron.config_of("ForMaskedLM"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    source = build("ForMaskedLM")
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    assert model.eval()(**batch_for("ForMaskedLM")).logits.equal(source(**batch_for("ForMaskedLM")).logits)


def test_dynamic_quantization_finds_the_linear_layers():
    model, batch = build("ForSequenceClassification"), batch_for("ForSequenceClassification")
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(module).__module__ for module in quantized.modules() if type(module).__name__ == "Linear"]
    assert len(kinds) == 2 * 6 + 2
    assert all("quantized" in kind for kind in kinds)
    difference = (quantized(**batch).logits - model(**batch).logits).abs().max()
    assert 0 < difference < 1.5


def test_gradients_reach_what_is_returned():
    """Hidden states, attentions, and what lies between the last hidden state and the pooled one."""
    model, batch = build("Model"), batch_for("Model")
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    kept = [out.last_hidden_state, *out.hidden_states, *out.attentions]
    for tensor in kept:
        tensor.retain_grad()
    out.pooler_output.square().sum().backward()
    for number, tensor in enumerate(kept):
        assert tensor.grad is not None, number
        assert tensor.grad.abs().sum() > 0, number
