"""Inputs laid out as RoBERTa's are those of transformers' tokenizer of the same vocabulary."""

from __future__ import annotations

import pytest

from megatron_bert import AutoTokenizer
from megatron_bert.data.tokenizers import load_tokenizer
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer
from tests.megatron_bert.ibert.family.support import CONFIG

TEXTS = ["Hello, my dog is cute", "The capital of France is Paris.", "a nice puppet"]


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    write_roberta_tokenizer(tmp_path, TEXTS)
    return tmp_path


@pytest.mark.parametrize(
    "inputs",
    [
        (TEXTS,),
        (TEXTS, TEXTS[::-1]),
        (["The capital of France is <mask>.", "<mask> dog", "a<mask>"],),
    ],
    ids=["texts", "pairs", "masks"],
)
def test_inputs_are_those_of_transformers(inputs, folder):
    transformers = pytest.importorskip("transformers")
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found, expected = ours(*inputs), theirs(*inputs, padding=True, return_tensors="pt")
    assert list(found) == list(expected) == ["input_ids", "attention_mask"]
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    assert ours.mask_token_id == theirs.mask_token_id


def test_saved_and_loaded(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    CONFIG.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.roberta
    assert again(TEXTS, TEXTS)["input_ids"].equal(tokenizer(TEXTS, TEXTS)["input_ids"])
    assert again(TEXTS, TEXTS, truncation=True, max_length=9)["input_ids"].shape == (3, 9)
    assert not AutoTokenizer(load_tokenizer(folder)).roberta
