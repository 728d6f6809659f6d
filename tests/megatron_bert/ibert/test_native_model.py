# SPDX-License-Identifier: Apache-2.0
"""NativeModel: the answers of IntegerModel with numpy alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bert.ibert import IntegerModel, NativeModel
from megatron_bert.ibert.engine.place import PLAN_NAME
from parallel.errors import UserError
from tests.megatron_bert.ibert.test_integer_model import quantized

SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
TYPES = [[0, 0, 1, 1, 1, 1, 1], [0], [1, 0, 0]]


def saved(name: str, path, monkeypatch) -> tuple[NativeModel, IntegerModel]:
    monkeypatch.setenv("MEGATRON_BERT_CPU_TARGET", "plain")
    IntegerModel.from_model(quantized(name)[0], "reference").save(path / "plan.safetensors")
    return NativeModel(path / "plan.safetensors"), IntegerModel.from_pretrained(path / "plan.safetensors", "reference")


def rectangles() -> dict[str, torch.Tensor]:
    """The sequences as IntegerModel takes them."""
    shape = (len(SEQUENCES), max(map(len, SEQUENCES)))
    given = {key: torch.zeros(shape, dtype=torch.long) for key in ("input_ids", "attention_mask", "token_type_ids")}
    for row, (ids, types) in enumerate(zip(SEQUENCES, TYPES, strict=True)):
        given["input_ids"][row, : len(ids)] = torch.tensor(ids)
        given["token_type_ids"][row, : len(ids)] = torch.tensor(types)
        given["attention_mask"][row, : len(ids)] = 1
    return given


@pytest.mark.parametrize(
    ("name", "head", "field"),
    [
        ("MegatronBertModel", "pooler", "pooler_output"),
        ("MegatronBertForSequenceClassification", "classifier", "logits"),
        ("MegatronBertForTokenClassification", "classifier", "logits"),
        ("MegatronBertForMaskedLM", "masked", "logits"),
        ("MegatronBertForNextSentencePrediction", "pair", "logits"),
    ],
)
def test_answers_are_those_of_the_integer_model(name, head, field, tmp_path, monkeypatch):
    native, integer = saved(name, tmp_path, monkeypatch)
    expected, found = integer(**rectangles())[field].numpy(), native.logits(SEQUENCES, TYPES, head)
    for row, sequence in enumerate(SEQUENCES):
        wanted = expected[row] if isinstance(found, np.ndarray) else expected[row, : len(sequence)]
        assert found[row].dtype == np.float32
        assert np.array_equal(found[row], wanted)


def test_hidden_states_are_those_of_the_integer_model(tmp_path, monkeypatch):
    native, integer = saved("MegatronBertModel", tmp_path, monkeypatch)
    expected = integer(**rectangles()).last_hidden_state.numpy()
    for row, found in enumerate(native.hidden_states(SEQUENCES, TYPES)):
        assert np.array_equal(found, expected[row, : len(SEQUENCES[row])])


def test_bad_input_is_refused_in_a_sentence(tmp_path, monkeypatch):
    native, _ = saved("MegatronBertForSequenceClassification", tmp_path, monkeypatch)
    for wrong, sentence in (
        ([], "a batch has no sequence"),
        ([[1], []], "or one without tokens"),
        ([[1, 90]], "token 90 is outside of 0 to 89"),
        ([[2**40]], "token 2147483647 is outside of 0 to 89"),
        ([[-1]], "token -1 is outside of 0 to 89"),
        ([[1] * 41], "sequence 0 has 41 tokens, but the model takes at most 40"),
        ([[0.5]], "token ids are float64: give integers"),
        ([2, 5], r"token ids are \[2, 5\]: give a list of integers for each sequence"),
        ([[[2, 5, 3]]], "give a list of integers for each sequence"),
        ([[[2, 50]], [[7, 8]]], "give a list of integers for each sequence"),
        ([[2, [5]]], "give a list of integers for each sequence"),
        (np.zeros((1, 3, 0), np.int64), "give a list of integers for each sequence"),
        (None, "token ids are None: give a list"),
        (["ab"], "give a list of integers for each sequence"),
    ):
        with pytest.raises(UserError, match=sentence):
            native.logits(wrong)
    with pytest.raises(UserError, match="types have other lengths"):
        native.logits([[1, 2]], [[0]])
    with pytest.raises(UserError, match="types are 3: give a list of integers for each sequence"):
        native.logits([[1, 2]], 3)
    for head in ("masked", None):
        with pytest.raises(UserError, match=f"the plan has no head {head!r}"):
            native.logits([[1, 2]], head=head)
    with pytest.raises(UserError, match="threads is 4294967297, not 1 to 1024"):
        NativeModel(tmp_path / "plan.safetensors", 2**32 + 1)
    with pytest.raises(UserError, match="sequences end at token 3, but 1 tokens are given"):
        native.engine.encode(np.zeros((1, 3), np.int32), None, None, np.array([0, 3]))
    with pytest.raises(UserError, match="threads is 0"):
        NativeModel(tmp_path / "plan.safetensors", 0)
    with pytest.raises(UserError, match=r"holds no integer_plan\.safetensors"):
        NativeModel(tmp_path)
    longer = tmp_path / "longer.safetensors"
    longer.write_bytes((tmp_path / "plan.safetensors").read_bytes() + b" ")
    with pytest.raises(UserError, match="there is more in it than its tensors"):
        NativeModel(longer)


def test_nothing_imports_torch(tmp_path, monkeypatch):
    native, _ = saved("MegatronBertForSequenceClassification", tmp_path, monkeypatch)
    code = (
        "import sys; from megatron_bert.ibert import NativeModel\n"
        f"print(NativeModel({str(tmp_path / 'plan.safetensors')!r}).logits([[5, 6, 7]]).tolist())\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"{native.logits([[5, 6, 7]]).tolist()}\n"


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    (tmp_path / "serve" / "integer").mkdir(parents=True)
    IntegerModel.from_model(quantized("MegatronBertForSequenceClassification")[0], "reference").save(
        tmp_path / "serve" / "integer" / PLAN_NAME
    )
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[3] / "docs" / "quantization.md").read_text(encoding="utf-8")
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "NativeModel(" in each)
    names: dict = {}
    exec(re.sub(r"\b\d{3,}\b", "7", block), names)  # the model here has 90 words
    assert names["logits"].shape == (2, 2)
