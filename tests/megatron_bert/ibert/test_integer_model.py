# SPDX-License-Identifier: Apache-2.0
"""IntegerModel: what the float classes answer, bit for bit what the simulation does; and plans as files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_bert
from megatron_bert.ibert import IntegerModel, QuantizationConfig, calibrate, freeze_ranges, quantize_model
from megatron_bert.ibert.engine.answer import Answer
from megatron_bert.ibert.engine.plan_file import read_plan
from parallel.errors import UserError

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")
CLASSES = (
    *(family + head for family in ("MegatronBert", "IBert") for head in (*HEADS, "ForMaskedLM", "Model")),
    "MegatronBertForPreTraining",
    "MegatronBertForNextSentencePrediction",
)


def quantized(name: str, **settings):
    """A model of a public class, its inputs, and its answers."""
    config = (megatron_bert.IBertConfig if name.startswith("IBert") else megatron_bert.MegatronBertConfig)(**SIZES)
    model = getattr(megatron_bert, name)(config).eval()
    quantize_model(model, QuantizationConfig(**settings))
    ids = torch.randint(3, 90, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:], ids[1, 7:] = 0, config.pad_token_id
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape)}
    if name.startswith("IBert"):
        given["token_type_ids"] = torch.zeros_like(ids)
    if "Choice" in name:
        given = {key: value[:, None].repeat(1, 2, 1) for key, value in given.items()}
    calibrate(model, [given], lambda batch: model(**batch))
    freeze_ranges(model)
    with torch.no_grad():
        return model, given, model(**given)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict]:
    model, given, _ = quantized("MegatronBertForSequenceClassification")
    IntegerModel.from_model(model, "reference").save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors", given


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name, tmp_path):
    model, given, expected = quantized(name, weight_bits=7 if name == "IBertForMaskedLM" else 8)
    IntegerModel.from_model(model, "reference").save(tmp_path / "plan.safetensors")
    found = IntegerModel.from_pretrained(tmp_path / "plan.safetensors", "reference")(**given)
    assert list(found) == list(expected)
    mask = given["attention_mask"].bool()
    for field, value in expected.items():
        assert found[field].shape == value.shape
        rows = mask if value.shape[:2] == mask.shape and "Choice" not in name else slice(None)
        assert torch.equal(found[field][rows], value[rows]), field
        if rows is mask:
            assert not found[field][~mask].any()


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    """Though the values are the backend's then, and not held twice."""
    model = IntegerModel.from_pretrained(saved[0])
    if model.backend == "cpu":
        assert model.plan.embeddings.word.is_meta
    model.save(tmp_path / "again.safetensors")
    again = IntegerModel.from_pretrained(tmp_path / "again.safetensors", "reference")
    assert torch.equal(again(**saved[1]).logits, model(**saved[1]).logits)


def test_answers_are_read_as_the_float_classes_outputs_are():
    answer = Answer(logits=torch.ones(2), pooler_output=None)
    assert answer.logits is answer["logits"] is answer[0] is answer.to_tuple()[0]
    assert answer[:1] == (answer.logits,)
    assert (answer.loss, answer.pooler_output, len(answer)) == (None, None, 1)
    with pytest.raises(AttributeError, match="the model answers logits, not start_logits"):
        _ = answer.start_logits


def test_a_first_answer_needs_neither_transformers_nor_torchs_compiler(saved):
    code = (
        "import sys, torch; from megatron_bert.ibert import IntegerModel\n"
        f"print(IntegerModel.from_pretrained({str(saved[0])!r})(torch.tensor([[5, 6]])).logits.shape)\n"
        "print({'transformers', 'torch._dynamo', 'sympy', 'pydantic'} & sys.modules.keys())\n"
        "engine = 'megatron_bert.ibert.engine'\n"
        "print({'parallel.collectives', f'{engine}.reference', f'{engine}.plan_check'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 2])\nset()\nset()\n", done.stderr


def test_a_plan_holds_no_floating_point_and_is_small(tmp_path):
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 3000}
    model = megatron_bert.MegatronBertForMaskedLM(megatron_bert.MegatronBertConfig(**sizes)).eval()
    quantize_model(model, QuantizationConfig())
    ids = torch.randint(3, 90, (2, 30))
    calibrate(model, [ids], model)
    path = tmp_path / "plan.safetensors"
    IntegerModel.from_model(model, "reference").save(path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} <= {"I8", "I16", "I32"}
    assert len(data) < 0.29 * 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": torch.tensor([[5, 90]])}, "input_ids has 90, but the model's go from 0 to 89"),
        ({"input_ids": torch.tensor([[-1]])}, "input_ids has -1"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "give sequences of tokens"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "give sequences of tokens"),
        ({"input_ids": torch.ones(2, 3)}, "give a tensor of integers"),
        ({"input_ids": torch.ones(1, 41, dtype=torch.int64)}, "41 tokens, but the model takes 40"),
        ({"token_type_ids": torch.full((1, 4), 2)}, "token_type_ids has 2"),
        ({"token_type_ids": torch.zeros(1, 3, dtype=torch.int64)}, "token_type_ids has the shape"),
        ({"position_ids": torch.full((1, 4), 40)}, "position_ids has 40"),
        ({"token_type_ids": [[0] * 4]}, "token_type_ids is a list: give a tensor"),
        ({"position_ids": [[0] * 4]}, "position_ids is a list: give a tensor"),
        ({"attention_mask": [[1] * 4]}, "attention_mask is a list: give a tensor"),
        ({"attention_mask": torch.zeros(1, 4)}, "leaves nothing of sequence 0"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "pad on the right"),
    ],
)
def test_what_is_refused(change, said, saved):
    model = IntegerModel.from_pretrained(saved[0], "reference")
    with pytest.raises(UserError, match=said):
        model(**({"input_ids": torch.ones(1, 4, dtype=torch.int64)} | change))


def test_ids_of_every_integer_type(saved):
    model = IntegerModel.from_pretrained(saved[0], "reference")
    ids = torch.tensor([[5, 7, 9]])
    for dtype in (torch.uint8, torch.uint16, torch.uint64, torch.int16, torch.int32):
        assert torch.equal(model(ids.to(dtype)).logits, model(ids).logits)


def test_a_place_that_cannot_be_written_to(saved, tmp_path):
    model = IntegerModel.from_pretrained(saved[0])
    for place in (tmp_path, tmp_path / "missing" / "plan.safetensors"):
        with pytest.raises(UserError, match=r"cannot be written .*: give another file"):
            model.save(place)


def test_names_and_threads_are_checked(saved):
    with pytest.raises(UserError, match=r"backend is \['cpu'\]: choose one of auto, "):
        IntegerModel.from_pretrained(saved[0], ["cpu"])
    with pytest.raises(UserError, match="threads is 4294967296, not 1 to 1024"):
        IntegerModel.from_pretrained(saved[0], "reference", threads=2**32)
    with pytest.raises(UserError, match="backend is 'gpu': choose one of auto, "):
        IntegerModel.from_pretrained(saved[0], "gpu")
    with pytest.raises(UserError, match="threads is 0: give a number of 1 or more"):
        IntegerModel.from_pretrained(saved[0], threads=0)
    with pytest.raises(UserError, match=r"holds no integer_plan\.safetensors"):
        IntegerModel.from_pretrained(saved[0].parent)
    with pytest.raises(UserError, match="in floating point: quantize it first"):
        IntegerModel.from_model(megatron_bert.MegatronBertModel(megatron_bert.MegatronBertConfig(**SIZES)))


def _with_header(data: bytes, change) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "2"}, "newer megatron-bert"),
        ({"arithmetic": "1"}, "compile the quantized model again"),
        ({"format": "pt"}, "is not an integer plan"),
        ({"digest": "0"}, "its digest is another"),
        ({"plan": "[]"}, "its digest is another"),
    ],
)
def test_plans_of_other_versions(change, said, saved):
    path, _ = saved
    path.write_bytes(_with_header(path.read_bytes(), lambda header: header.update(change)))
    with pytest.raises(UserError, match=said):
        read_plan(path)


def test_a_thousand_damaged_plans_give_one_sentence_each(saved, monkeypatch):
    """Bits anywhere, cut ends; and with a digest that fits, so that every check is met too."""
    path, given = saved
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(3)
    for number in range(700):
        place, bit = (int(torch.randint(0, n, (), generator=generator)) for n in (len(data), 8))
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        path.write_bytes(changed if number % 3 else data[:place])
        with pytest.raises(UserError, match="plan"):
            read_plan(path)
    tree = json.loads(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["plan"])
    monkeypatch.setattr("megatron_bert.ibert.engine.plan_file._digest", lambda *_: "same")
    for number in range(300):
        changed = json.loads(json.dumps(tree))
        _change_something(changed, generator)
        text = json.dumps(changed)
        path.write_bytes(_with_header(data, lambda header, text=text: header.update(plan=text, digest="same")))
        try:
            IntegerModel(read_plan(path), "reference")(**given)
        except UserError:
            continue
        assert number >= 0  # another number, within its bounds, is another model


def _change_something(tree: dict, generator: torch.Generator) -> None:
    """Another value at a random place of the plan, the tensors' places among them."""
    here, key = tree, "layers"
    while True:
        inner = here[key] if key in ("layers",) or isinstance(here, (dict, list)) else None
        if not isinstance(inner, (dict, list)) or not inner:
            break
        here = inner
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = keys[int(torch.randint(0, len(keys), (), generator=generator))]
    values = [-1, 0, 10**9, 2**70, None, "x", [], {}, 1.5, True]
    here[key] = values[int(torch.randint(0, len(values), (), generator=generator))]
