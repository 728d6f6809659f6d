# SPDX-License-Identifier: Apache-2.0
"""Inputs laid out as RoBERTa's are those of transformers' tokenizer of the same vocabulary."""

from __future__ import annotations

import pytest

from megatron_bert import AutoTokenizer
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer
from tests.megatron_bert.ibert.family.support import CONFIG

TEXTS = ["Hello, my dog is cute", "The capital of France is Paris.", "a nice puppet"]


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    write_roberta_tokenizer(tmp_path, TEXTS)
    return tmp_path


def test_saved_for_transformers(folder, tmp_path):
    """A vocabulary that is saved is the same tokenizer for transformers, with its layout of pairs."""
    given = AutoTokenizer.from_pretrained(folder)
    save_tokenizer(load_tokenizer(folder), tmp_path, 18, roberta=True)
    CONFIG.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.model_max_length == 18
    for inputs in ((TEXTS,), (TEXTS, TEXTS[::-1]), (["The capital of France is <mask>.", "a<mask>"],)):
        found, expected = (each(*inputs, padding=True, return_tensors="pt") for each in (saved, given))
        assert list(found) == list(expected) == ["input_ids", "attention_mask"]
        assert found["input_ids"].equal(expected["input_ids"])
