# SPDX-License-Identifier: Apache-2.0
"""Sequences of RoBERTa's models are those of transformers' tokenizers, whatever files hold the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.tasks.encoding import feature, input_format, pooled_feature
from megatron_bert.tasks.registry import build_task
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from parallel.errors import UserError
from tests.megatron_bert.data.support import small_vocabulary
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer

TEXTS = ["Hello, my dog is cute", "The capital of France is Paris.", " a  naïve </s> puppet <mask>", ""]
# An empty second text is none to transformers.
PAIRS = [(first, second) for first in TEXTS for second in TEXTS if second]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoding")
    write_roberta_tokenizer(folder, TEXTS)
    return folder


@pytest.fixture(scope="module")
def two_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as vocab.json and merges.txt."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    target = tmp_path_factory.mktemp("two_files")
    vocabulary = model["vocab"] | {"<mask>": len(model["vocab"])}
    (target / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def test_ids_are_those_of_roberta(folder: Path, two_files: Path) -> None:
    # Here texts never yield special tokens.
    theirs = transformers.RobertaTokenizerFast.from_pretrained(two_files, split_special_tokens=True)
    for place in (folder, two_files, two_files / "vocab.json"):
        tokenizer = load_tokenizer(place)
        form = input_format(tokenizer, roberta=True)
        encode = tokenizer.encode
        assert tokenizer.pad_id == 1
        for text in TEXTS:
            found = pooled_feature(tokenizer, form, encode(text), None, 64)
            assert found.tokens.tolist() == theirs(text)["input_ids"]
        for first, second in PAIRS:
            found = pooled_feature(tokenizer, form, encode(first), encode(second), 64)
            expected = theirs(first, second)["input_ids"]
            assert found.tokens.tolist() == expected
            assert len(expected) == form.pair_specials + len(encode(first)) + len(encode(second))
            assert not found.types.any()
            assert found.rows.tolist() == [0]


@pytest.mark.parametrize("length", [8, 12, 20])
def test_what_is_too_long_is_cut_as_in_transformers(folder: Path, length: int) -> None:
    tokenizer, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    form = input_format(tokenizer, roberta=True)
    first, second = TEXTS[:2]
    for pair in ((first, second), (second, first)):
        found = pooled_feature(tokenizer, form, *map(tokenizer.encode, pair), length)
        assert found.tokens.tolist() == theirs(*pair, truncation=True, max_length=length)["input_ids"]


def test_berts_vocabulary_has_one_separator_in_a_roberta_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_vocabulary(tmp_path, ["a", "b"]))
    form = input_format(tokenizer, roberta=True)
    assert (form.separators, form.types) == (1, False)
    ids = [tokenizer.encode(text) for text in ("a", "b")]
    alike = feature(tokenizer, input_format(tokenizer, roberta=False), *ids)
    found = feature(tokenizer, form, *ids)
    assert found.tokens.tolist() == alike.tokens.tolist()
    assert (found.types.tolist(), alike.types.tolist()) == ([0] * 5, [0, 0, 0, 1, 1])


def test_roberta_separators_in_windows_of_answers(folder: Path) -> None:
    """Sequences keep their length, and rows point at the answer behind both separators."""
    tokenizer = load_tokenizer(folder)
    form = input_format(tokenizer, roberta=True)
    settings = TaskSettings(name="question_answering", max_length=16, doc_stride=3, max_query_length=4)
    task = build_task(settings, TaskDataSettings(), tokenizer, form)
    context = "The capital of France is Paris."
    example = task.example_from({"question": "capital of France?", "context": context}, "line 1")
    found = dict(zip(("ids", "spans"), tokenizer.encode_batch_with_spans([context])[0], strict=True))
    instances = task.instances([example], train=False)
    assert len(instances) > 1
    reached = 0
    for instance in instances:
        (sequence,) = instance.features
        tokens = sequence.tokens.tolist()
        assert len(tokens) <= 16
        assert tokens[instance.offset - 2 : instance.offset] == [tokenizer.sep_id] * 2
        window = tokens[instance.offset : -1]
        begin = found["spans"].index(tuple(instance.spans[0]))
        assert window == found["ids"][begin : begin + len(instance.spans)]
        reached = max(reached, begin + len(window))
        scores = np.full((len(tokens), 2), -9.0, dtype=np.float32)
        scores[instance.offset, 0] = scores[instance.offset + 1, 1] = 9.0
        answer = task.predictions([example], [instance], [scores])[0]
        if instance.widest[0]:
            assert answer["start"] == instance.spans[0][0]
    assert reached == len(found["ids"])


def test_a_vocabulary_in_two_files_is_whole_and_robertas(two_files: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((two_files / name).read_bytes())
    vocabulary = json.loads((two_files / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "merges.txt").write_text("no merge of two known pieces here\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"merges\.txt are not byte-level BPE vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.json needs the merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes((two_files / "merges.txt").read_bytes())
    del vocabulary["<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(UserError, match="has no <mask> piece: it is not RoBERTa's vocabulary"):
        load_tokenizer(tmp_path)


def test_xlm_roberta_is_read_from_its_json_alone(tmp_path: Path) -> None:
    """fairseq shifted the ids of its sentencepiece model; tokenizer.json has the model's."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁", "▁the", "▁cat", "s", "▁s", "at", "a", "t", "c", "h", "e"]
    vocabulary = [(piece, -float(number)) for number, piece in enumerate([*special, *pieces, "<mask>"])]
    theirs = transformers.XLMRobertaTokenizerFast(vocab=vocabulary)
    theirs.save_pretrained(tmp_path)
    transformers.XLMRobertaConfig(vocab_size=len(theirs)).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, model_type="xlm-roberta")
    form = input_format(tokenizer, roberta=True)
    ids = [tokenizer.encode(text) for text in ("the cats sat", "the cat")]
    assert pooled_feature(tokenizer, form, *ids, 64).tokens.tolist() == theirs("the cats sat", "the cat")["input_ids"]
    assert tokenizer.unk_id not in ids[0]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"whose ids fairseq has shifted: give its tokenizer\.json"):
        load_tokenizer(tmp_path, model_type="xlm-roberta")
