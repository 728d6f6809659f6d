# SPDX-License-Identifier: Apache-2.0
"""Token classification: column files, alignment, entities, seqeval's scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
from seqeval.scheme import BILOU, IOB2
from transformers import BertTokenizerFast

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.task import IGNORED, Instance, Task
from parallel.errors import UserError

from .support import letter_tokenizer, task_of, write

NAME = {"name": "token_classification"}
FILE = """-DOCSTART-\t-X-\tO

The\tDT\tO
cat\tNN\tB-animal
sat\tNN\tI-animal

"\tX\tO
New York\tX\tB-place
\u200d\tX\tI-place
\U0001f600\tX\tO
\t
mat\tNN\tB-animal"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


def logits_for(task: Task[Any, Any], instances: list[Instance]) -> list[np.ndarray]:
    return [np.eye(task.head.outputs, dtype=np.float32)[instance.label] * 4 for instance in instances]


@pytest.mark.parametrize("separator", ["\t", " ", "   \t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_column_files(tmp_path: Path, tokenizer: Tokenizer, separator: str, ending: str) -> None:
    content = FILE.replace("New York", "NewYork").replace("\t", separator) if separator == " " else FILE
    path = write(tmp_path / "a.conll", "\ufeff" + content.replace("\n", ending))
    task = task_of(tokenizer, NAME, {"train": path})
    assert task.labels == ("O", "B-animal", "I-animal", "B-place", "I-place")
    assert (task.head.kind, task.head.outputs) == ("token", 5)
    examples = task.examples("train")
    name = "NewYork" if separator == " " else "New York"
    assert [e.text for e in examples] == ["The cat sat", f'" {name} \u200d \U0001f600', "mat"]
    assert [e.tags for e in examples] == [
        ("O", "B-animal", "I-animal"),
        ("O", "B-place", "I-place", "O"),
        ("B-animal",),
    ]
    assert [e.where for e in examples] == [f"{path} line {n}" for n in (3, 7, 12)]


def test_columns_are_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.conll", "1 B-x the 2\n3 O cat 4\n")
    task = task_of(tokenizer, NAME, {"train": path, "columns": {"token": -2, "tag": 1}})
    (example,) = task.examples("train")
    assert (example.text, example.tags) == ("the cat", ("B-x", "O"))
    with pytest.raises(UserError, match="positions: give whole numbers"):
        task_of(tokenizer, NAME, {"train": path, "columns": {"token": "word"}})


def test_rows_are_first_pieces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.conll", FILE)
    task = task_of(tokenizer, NAME, {"train": path})
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    assert [instance.label.tolist() for instance in instances] == [[0, 1, 2], [0, 3, 4, 0], [1]]
    tokens = instances[1].features[0].tokens
    pieces = [tokenizer.id_to_token(int(token)) for token in tokens]
    first = [pieces[row] for row in instances[1].features[0].rows]
    assert first == ["[UNK]", "n", "[UNK]", "[UNK]"]  # the joiner is nothing after normalization, and is not left out
    assert pieces[0] == "[CLS]"
    assert pieces[-1] == "[SEP]"
    assert pieces[2:9] == ["n", "##e", "##w", "y", "##o", "##r", "##k"]
    assert not instances[1].features[0].types.any()


def test_alignment_equals_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    peer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    words = [
        "The",
        "cat's",
        "(mat),",
        "\u0130zmir",
        "\U0001f600\U0001f600",
        "caf\u00e9",
        "12.5",
        "\u4e2d\u6587",
        "x" * 120,
    ]
    task = task_of(tokenizer, NAME | {"labels": ["O", "B-x", "I-x"]})
    (instance,) = task.instances([task.example_from({"tokens": words}, "line 1")], train=False)
    expected = peer(words, is_split_into_words=True)
    assert instance.features[0].tokens.tolist() == expected["input_ids"]
    of_word = expected.word_ids()
    assert instance.features[0].rows.tolist() == [of_word.index(number) for number in range(len(words))]


@pytest.mark.parametrize("length", [8, 12, 64])
def test_long_sentences_lose_no_word(tmp_path: Path, tokenizer: Tokenizer, length: int) -> None:
    rng = np.random.default_rng(length)
    words = ["".join(rng.choice(list("abcdefg"), size=rng.integers(1, 9))) for _ in range(60)]
    words[20] = "x" * 90  # more pieces than any window
    words[21] = "\u200b"
    tags = [f"{'B' if number % 3 == 0 else 'I'}-x" if number % 5 else "O" for number in range(60)]
    tags = ["B-x" if tag == "I-x" and tags[n - 1] == "O" else tag for n, tag in enumerate(tags)]
    path = write(tmp_path / "a.conll", "".join(f"{word} {tag}\n" for word, tag in zip(words, tags, strict=True)))
    task = task_of(tokenizer, NAME | {"max_length": length}, {"train": path})
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    assert len(instances) > 3
    assert all(len(instance.features[0].tokens) <= length for instance in instances)
    assert sorted(word for instance in instances for word in instance.words.tolist()) == list(range(60))
    for instance in instances:
        for row, word in zip(instance.features[0].rows, instance.words, strict=True):
            piece = tokenizer.id_to_token(int(instance.features[0].tokens[row]))
            assert piece == ("[UNK]" if word == 21 else words[word][0])
    (prediction,) = task.predictions(examples, instances, logits_for(task, instances))
    assert prediction["tags"] == tags
    assert task.metrics(examples, [prediction])["f1"] == 1.0


def test_entities_with_characters(tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, NAME | {"labels": ["O", "B-x", "I-x"]})
    text = "At \u0130zmir, cafe\u0301 \U0001f600 (New  York)!"
    example = task.example_from({"text": text, "id": 3}, "line 1")
    words = [text[begin:end] for begin, end in example.words]
    assert words == ["At", "\u0130zmir", ",", "cafe\u0301", "\U0001f600", "(", "New", "York", ")", "!"]
    instances = task.instances([example], train=False)
    assert instances[0].label.tolist() == [IGNORED] * len(words)
    logits = np.zeros((len(words), 3), dtype=np.float32)
    logits[:, 0] = 1.0
    logits[1, 1] = logits[3, 1] = logits[6, 1] = 3.0
    logits[4, 2] = logits[7, 2] = 5.0
    (prediction,) = task.predictions([example], instances, [logits])
    found = [(e["type"], e["text"], e["start"], e["end"]) for e in prediction["entities"]]
    assert found == [
        ("x", "\u0130zmir", 3, 8),
        ("x", "cafe\u0301 \U0001f600", 10, 17),
        ("x", "New  York", 19, 28),
    ]
    assert all(text[begin:end] == part for _, part, begin, end in found)
    assert (prediction["id"], prediction["text"], prediction["tokens"]) == (3, text, words)
    one, two = np.exp(3) / (np.exp(3) + np.e + 1), np.exp(5) / (np.exp(5) + np.e + 1)
    assert [e["probability"] for e in prediction["entities"]] == pytest.approx([one, (one + two) / 2, (one + two) / 2])


def test_constrained_decoding(tokenizer: Tokenizer) -> None:
    """Each word alone would be O, I-x, I-x; as a sequence B-x takes the place of the first I-x."""
    scores = np.log(np.array([[0.8, 0.1, 0.1], [0.2, 0.35, 0.45], [0.1, 0.1, 0.8]]))
    found = {}
    for decoding in ("argmax", "constrained"):
        task = task_of(tokenizer, NAME | {"labels": ["O", "B-x", "I-x"], "decoding": decoding})
        example = task.example_from({"text": "the cat sat"}, "line 1")
        (found[decoding],) = task.predictions([example], task.instances([example], train=False), [scores])
    assert (found["argmax"]["tags"], found["argmax"]["entities"]) == (["O", "I-x", "I-x"], [])
    assert found["constrained"]["tags"] == ["O", "B-x", "I-x"]
    assert found["constrained"]["probabilities"] == pytest.approx([0.8, 0.35, 0.8])
    assert [entity["text"] for entity in found["constrained"]["entities"]] == ["cat sat"]


def test_words_given_as_a_list(tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, NAME | {"labels": ["O", "B-x", "I-x"]})
    example = task.example_from({"tokens": ["can't", "stop"]}, "line 1")
    assert (example.text, example.words) == ("can't stop", ((0, 5), (6, 10)))
    empty = [task.example_from({"text": " "}, "line 2"), task.example_from({"tokens": []}, "line 3")]
    instances = task.instances(empty, train=False)
    assert [(instance.features[0].tokens.tolist(), len(instance.features[0].rows)) for instance in instances] == [
        ([2, 3], 0)
    ] * 2
    predictions = task.predictions(empty, instances, [np.zeros((0, 3), dtype=np.float32)] * 2)
    assert [(p["tags"], p["entities"]) for p in predictions] == [([], [])] * 2
    for row in ({"tokens": "a b"}, {"tokens": ["a", 1]}):
        with pytest.raises(UserError, match='line 4 needs a list of texts under "tokens"'):
            task.example_from(row, "line 4")
    with pytest.raises(UserError, match='line 5 has no "text"'):
        task.example_from({"words": []}, "line 5")


@pytest.mark.parametrize(("scheme", "kind"), [("BIO", IOB2), ("BILOU", BILOU)])
@pytest.mark.filterwarnings("error")
def test_scores_equal_seqeval(tmp_path: Path, tokenizer: Tokenizer, scheme: str, kind: Any) -> None:
    rng = np.random.default_rng(1)
    single, first, last = ("B", "B", "I") if scheme == "BIO" else ("U", "B", "L")
    parts = [["O"], [f"{single}-a"], [f"{single}-b"], [f"{first}-a", "I-a", f"{last}-a"], [f"{first}-b", f"{last}-b"]]
    true = [[tag for number in rng.integers(5, size=4) for tag in parts[number]] for _ in range(20)]
    content = "\n".join("".join(f"x {tag}\n" for tag in tags) for tags in true)
    task = task_of(tokenizer, NAME | {"scheme": scheme}, {"train": write(tmp_path / "a.conll", content)})
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    logits = [scores + rng.normal(scale=2, size=scores.shape) for scores in logits_for(task, instances)]
    predictions = task.predictions(examples, instances, logits)
    given = [prediction["tags"] for prediction in predictions]
    assert 0 < sum(a != b for a, b in zip(true, given, strict=True)) < 20
    options = {"mode": "strict", "scheme": kind}
    found = task.metrics(examples, predictions)
    assert found["f1"] == pytest.approx(seqeval.metrics.f1_score(true, given, **options))
    assert found["precision"] == pytest.approx(seqeval.metrics.precision_score(true, given, **options))
    assert found["recall"] == pytest.approx(seqeval.metrics.recall_score(true, given, **options))
    assert found["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(true, given))
    each = seqeval.metrics.f1_score(true, given, average=None, **options)
    assert [found["f1_a"], found["f1_b"]] == pytest.approx(each.tolist())
    assert 0 < found["f1"] < 1
    assert tuple(found) == task.metrics_names
    labels, counts = task.confusion(examples, predictions) or ((), np.zeros(0))
    assert labels == task.labels
    assert np.trace(counts) / counts.sum() == pytest.approx(found["accuracy"])
    # Entities of the predictions are those that are scored.
    entities = sum(len(prediction["entities"]) for prediction in predictions)
    right = found["recall"] * sum(tag[0] in "BU" for tags in true for tag in tags)
    assert right / entities == pytest.approx(found["precision"])


@pytest.mark.filterwarnings("error")
def test_scores_without_entities(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings = NAME | {"labels": ["O", "B-x", "I-x"]}
    task = task_of(tokenizer, settings, {"valid": write(tmp_path / "a.conll", "a O\nb O\n")})
    examples = task.examples("valid")
    instances = task.instances(examples, train=False)
    predictions = task.predictions(examples, instances, logits_for(task, instances))
    assert task.metrics(examples, predictions) == {
        "f1": 0.0,
        "precision": 0.0,
        "recall": 0.0,
        "accuracy": 1.0,
        "f1_x": 0.0,
    }


def test_io(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.conll", "a I-x\nb I-x\nc I-y\nd O\n")
    task = task_of(tokenizer, NAME | {"scheme": "IO"}, {"train": path})
    assert task.labels == ("O", "I-x", "I-y")
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    predictions = task.predictions(examples, instances, logits_for(task, instances))
    assert [e["text"] for e in predictions[0]["entities"]] == ["a b", "c"]
    assert task.metrics(examples, predictions)["f1"] == 1.0


@pytest.mark.filterwarnings("error")
def test_tags_that_mark_no_entity(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """An I without B is an entity neither in the predictions nor in the scores."""
    task = task_of(tokenizer, NAME, {"train": write(tmp_path / "a.conll", "a B-x\nb O\n")})
    examples = task.examples("train")
    predictions = task.predictions(
        examples, task.instances(examples, train=True), [np.eye(3, dtype=np.float32)[[2, 2]]]
    )
    assert (predictions[0]["tags"], predictions[0]["entities"]) == (["I-x", "I-x"], [])
    assert task.metrics(examples, predictions)["f1"] == 0.0
    task = task_of(tokenizer, NAME | {"labels": ["O", "B-x", "I-x"]}, {"train": write(tmp_path / "b.conll", "a O\n")})
    examples = task.examples("train")
    predictions = task.predictions(examples, task.instances(examples, train=True), [np.eye(3, dtype=np.float32)[[2]]])
    assert task.metrics(examples, predictions)["f1"] == 0.0


BAD = [
    (b"good O\n\na O\nb\nc O\n\nlast B-x\n", 4, "no tag in column -1"),
    (b"good O\n\na O\nb\tB-x\tI-\nlast2 O\n\nlast B-x\n", 3, "none of BIO"),
    (b"good O\n\na O\n\tO\n\nlast B-x\n", 4, "no word in column 0"),
    (b"good O\n\na O\n\xe4 O\n\nlast B-x\n", 4, "not UTF-8"),
    (b"good O\n\na O\nb\0 O\n\nlast B-x\n", 4, "NUL"),
    (b"good O\n\na O\nb I-x\n\nlast B-x\n", 3, 'tag "I-x" of word 2 after O does not follow BIO'),
    (b"good O\n\na O\nb S-x\n\nlast B-x\n", 3, 'tag "S-x" is none of BIO'),
]


@pytest.mark.parametrize(("content", "line", "reason"), BAD)
def test_bad_sentences(tmp_path: Path, tokenizer: Tokenizer, content: bytes, line: int, reason: str) -> None:
    path = write(tmp_path / "a.conll", content)
    with pytest.raises(UserError, match=rf"a\.conll line {line}.*: .*{reason}"):
        task_of(tokenizer, NAME, {"train": path}).examples("train")
    task = task_of(tokenizer, NAME, {"train": path, "on_bad_row": "skip"})
    assert [example.text for example in task.examples("train")] == ["good", "last"]
    assert task.bad_rows.count == 1


def test_unknown_types_and_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, valid = write(tmp_path / "a.conll", "a B-x\n"), write(tmp_path / "b.conll", "a O\n\nb B-y\n")
    task = task_of(tokenizer, NAME, {"train": train, "valid": valid})
    with pytest.raises(UserError, match=r'line 3.*tag "B-y" is unknown .known: O, B-x, I-x'):
        task.examples("valid")
    with pytest.raises(UserError, match='no "O"'):
        task_of(tokenizer, NAME | {"labels": ["B-x", "I-x"]})
    with pytest.raises(UserError, match='tag "PER" is none of BIO'):
        task_of(tokenizer, NAME | {"labels": ["O", "PER"]})
    with pytest.raises(UserError, match="marks no entity in the scheme BILOU"):
        task_of(tokenizer, NAME | {"scheme": "BILOU"}, {"train": write(tmp_path / "c.conll", "a O\n")})
    with pytest.raises(UserError, match=r"set task\.labels or data\.train"):
        task_of(tokenizer, NAME, {"valid": valid})


def test_untagged_test_files_and_submissions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = write(tmp_path / "a.conll", FILE)
    test = write(tmp_path / "t.conll", "The\ncat\n\nmat\n")
    task = task_of(tokenizer, NAME, {"train": train, "test": test})
    examples = task.examples("test")
    assert [example.tags for example in examples] == [None, None]
    instances = task.instances(examples, train=False)
    logits = [np.eye(5, dtype=np.float32)[[0, 1][: len(instance.words)]] for instance in instances]
    predictions = task.predictions(examples, instances, logits)
    assert task.metrics(examples, predictions) == {}
    assert task.confusion(examples, predictions) is None
    (path,) = task.write_submission(examples, predictions, tmp_path / "out")
    assert path.name == "test.conll"
    assert path.read_text() == "The\tO\ncat\tB-animal\n\nmat\tO\n\n"
    examples = task.examples("train")
    instances = task.instances(examples, train=True)
    predictions = task.predictions(examples, instances, logits_for(task, instances))
    (path,) = task.write_submission(examples, predictions, tmp_path / "out")
    lines = path.read_text().split("\n")
    assert lines[:5] == ["The\tO\tO", "cat\tB-animal\tB-animal", "sat\tI-animal\tI-animal", "", '"\tO\tO']
    # What was written is read again.
    again = task_of(tokenizer, NAME, {"train": path})
    assert [example.tags for example in again.examples("train")] == [example.tags for example in examples]


def test_restored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.conll", "a U-x\nb O\n")
    task = task_of(tokenizer, NAME | {"scheme": "BILOU"}, {"train": path})
    restored = restore_task(task.describe(), tokenizer)
    assert restored.labels == ("O", "B-x", "I-x", "L-x", "U-x")
    assert restored.metrics_names == task.metrics_names
    instances = restored.instances([restored.example_from({"text": "a b"}, "line 1")], train=False)
    example = restored.example_from({"text": "a b"}, "line 1")
    (prediction,) = restored.predictions([example], instances, [np.eye(5, dtype=np.float32)[[4, 0]]])
    assert prediction["entities"][0]["text"] == "a"


def test_white_space_of_unicode_is_part_of_a_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A no-break space and a line separator end neither a word nor a line."""
    path = write(tmp_path / "a.conll", "the\u00a0cat NN B-x\n\u2028 NN O\n\u3000\nmat  NN   I-x\n")
    with pytest.raises(UserError, match="line 3: it has no tag"):
        task_of(tokenizer, NAME, {"train": path}).examples("train")
    path = write(tmp_path / "b.conll", "the\u00a0cat NN B-x\n\u2028 NN O\nmat  NN   B-x\n")
    (example,) = task_of(tokenizer, NAME, {"train": path}).examples("train")
    assert [example.text[begin:end] for begin, end in example.words] == ["the\u00a0cat", "\u2028", "mat"]
    assert example.tags == ("B-x", "O", "B-x")
