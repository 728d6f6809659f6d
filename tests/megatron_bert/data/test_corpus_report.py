# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.cli import main
from megatron_bert.data.corpus_report import CorpusReport, SampleOptions, show_sample
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.sentence_pairs import Sample
from megatron_bert.data.tokenizers import load_tokenizer
from parallel.errors import UserError

from .support import small_vocabulary, write_corpus

TEXTS = [
    "The cat sat. The dog ran, xyz!",
    "A b.\nThe cats.",
    "the cat sat on the mat",
    "the cat sat on the mat",
    "猫 a",
]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    preprocess(["x.jsonl"], small_vocabulary(tmp_path), "c", progress=False)
    return tmp_path


def test_what_a_corpus_holds(made: Path) -> None:
    report = CorpusReport("c_text_sentence.idx", load_tokenizer(made / "vocab.txt"))
    lines = report.lines(SampleOptions(seq_length=16))
    # the cat sat . / the dog ran , [UNK] ! / a b . / the cat ##s . / 2 x 6 / [UNK] a
    assert lines[0].startswith("c_text_sentence: a corpus of 5 documents, 7 sentences, 31 tokens (uint16, 0.0 MB)")
    assert lines[1].startswith("made with: tokenizer of 22 entries (")
    assert lines[1].endswith("language en, sentences by sentencex")
    assert lines[2] == "duplicates: 1 documents (20.0%) equal an earlier one"
    assert lines[3].startswith("tokens per document: mean 6.2, median 6")
    assert "sentences per document: mean 1.4" in lines[4]
    assert lines[5].endswith("longest 6")
    assert lines[6] == "unknown tokens: 2 (6.452%)"
    assert lines[7].startswith("vocabulary: 14 of 22 entries occur; 1.03 tokens per word")
    assert lines[8].startswith("characters by language (of 5 documents): ")
    assert lines[9].startswith("characters by script (of 5 documents): Latin 9")
    assert lines[10].startswith("samples of 16 tokens (pair_objective sop): 2 an epoch, ")
    assert "; 54.8% of the tokens are used" in lines[10], "17 of 31: documents of one sentence give no pair"
    full = float(lines[10].split("an epoch, ")[1].split("%")[0]) / 100
    assert full == pytest.approx((17 + 2 * 3) / (2 * 16), abs=0.001)
    assert report.texts(2) == ["document 0: the cat sat. the dog ran,!", "document 4: a"]


def test_shares_of_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    english = "the man walks into the town and buys some bread for his children who are waiting at home"
    german = "der mann geht in die stadt und kauft brot für seine kinder die zu hause auf ihn warten"
    words = sorted({*english.split(), *german.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (english, german, english)))
    preprocess(["x.jsonl"], tmp_path / "vocab.txt", "c", progress=False, lowercase=False)
    lines = CorpusReport("c_text_sentence", load_tokenizer(tmp_path / "vocab.txt", lowercase=False)).lines(
        SampleOptions(seq_length=16)
    )
    letters = [len(text.replace(" ", "")) for text in (english, german)]
    share = 2 * letters[0] / (2 * letters[0] + letters[1])
    assert f"characters by language (of 3 documents): en {share:.1%}, de {1 - share:.1%}" in lines


def test_a_sample_shows_what_is_hidden(made: Path) -> None:
    tokenizer = load_tokenizer(made / "vocab.txt")
    ids = [tokenizer._pieces.index(piece) for piece in ("[CLS]", "the", "[MASK]", "[SEP]", "dog", "[SEP]")]
    places, labels = np.array([2, 4]), np.array([tokenizer._pieces.index("cat"), ids[4]])
    sample = Sample(np.array(ids), np.array([0, 0, 0, 0, 1, 1]), places, labels, 1)
    assert show_sample(sample, tokenizer, "sop") == (
        "6 tokens, 2 to predict; the segments are swapped\n  [CLS] the {[MASK]=cat} [SEP] {dog} [SEP]"
    )
    assert "the second segment is of another document" in show_sample(sample, tokenizer, "nsp")


def test_the_command(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["inspect", "c_text_sentence"]
    assert main(common) == 0
    assert "give --tokenizer to see" in capsys.readouterr().out
    options = ["--tokenizer", "vocab.txt", "--sample", "2", "--seq-length", "16", "--pair-objective", "none"]
    assert main([*common, *options, "--png", "x.png"]) == 0
    out = capsys.readouterr().out
    assert out.count(" to predict\n  [CLS] ") == 2
    assert (made / "x.png").read_bytes().startswith(b"\x89PNG")
    write_corpus(made / "nvidia", [[[5, 6], [7, 8]]])
    assert main(["inspect", "nvidia.bin"]) == 0
    assert "tokenizer: not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c_text_sentence", "--sample", "2"], "--sample needs a number"),
        (["c_text_sentence", "--verify"], "--verify is for checkpoints"),
        (["nowhere", "--sample", "2"], "--sample is for corpora, and there is no nowhere.idx"),
        (["corpus.jsonl.gz"], "corpus.jsonl.gz holds text, of which preprocess makes a corpus"),
        (["none", "--tokenizer", "vocab.txt"], "holds no sentence"),
        (["wide", "--tokenizer", "vocab.txt"], "holds token ids from 5 to 600 but the vocabulary has 22"),
        (["c_text_sentence", "--tokenizer", "vocab.txt", "--png", "no/x.png"], r"cannot be written"),
    ],
)
def test_mistakes(made: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    write_corpus(made / "none", [])
    write_corpus(made / "wide", [[[5, 600]]])
    (made / "corpus.jsonl.gz").touch()
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_tokenizer(made: Path) -> None:
    small_vocabulary(made, ["the"])
    with pytest.raises(UserError, match="was made with a tokenizer of 22 entries"):
        CorpusReport("c_text_sentence", load_tokenizer(made / "vocab.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-length", "128"], "--seq-length needs --tokenizer"),
        (["--seq-length", "7", "--tokenizer", "vocab.txt"], "--seq-length is 7: give 8 or more"),
        (["--png", "none/x.png"], "none/x.png cannot be written"),
        (["--png", "./c_text_sentence.idx"], "c_text_sentence.idx is the file of the corpus (.idx), too"),
    ],
)
def test_options_that_cannot_be(
    made: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.is_dir()
    assert main(["inspect", "c_text_sentence", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True), err
