# SPDX-License-Identifier: Apache-2.0
"""Question answering: SQuAD files, windows, answers as exact parts of the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizerFast

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.data.train_tokenizer import train_tokenizer
from megatron_bert.tasks.answer_windows import WindowInstance
from megatron_bert.tasks.registry import restore_task
from megatron_bert.tasks.squad_files import SpanExample
from megatron_bert.tasks.task import IGNORED
from parallel.errors import UserError

from .support import letter_tokenizer, task_of, write

NAME = {"name": "question_answering"}
CONTEXT = (
    "the cat sat on a mat. \u0130stanbul has \U0001f600 1,000 caf\u00e9s (cafe\u0301s), the \ufb01nest \u00bd of all."
)
ANSWERS = [
    "the cat",
    "\u0130stanbul",
    "\U0001f600",
    "1,000 caf\u00e9s",
    "cafe\u0301s",
    "\ufb01nest",
    "\u00bd of all",
    "all.",
]


def question(name: str, text: str, context: str = CONTEXT, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "question": f"where is {name}?",
        "answers": [{"text": text, "answer_start": context.index(text)}],
        **more,
    }


def squad(path: Path, *paragraphs: tuple[str, list[dict[str, Any]]]) -> Path:
    data = [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]} for context, qas in paragraphs]
    return write(path, json.dumps({"version": "1.1", "data": data}))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return letter_tokenizer(tmp_path)


def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    corpus = write(folder / "corpus.txt", f"{CONTEXT}\nwhere is q?\n" + "the cat sat on a mat of cafes\n" * 3)
    made = {"wordpiece": letter_tokenizer(folder)}
    for kind, size in (("bpe", 280), ("sentencepiece", 46)):
        made[kind] = train_tokenizer([corpus], kind, size, folder / kind, progress=False)  # type: ignore[arg-type]
    return made


def sure_logits(instances: list[WindowInstance]) -> list[np.ndarray]:
    """Scores of a model that knows the answer where the window has it, and says "no answer" where not."""
    found = []
    for instance in instances:
        scores = np.zeros((len(instance.features[0].tokens), 2), dtype=np.float32)
        scores[instance.label[0], 0] = scores[instance.label[1], 1] = 10.0
        found.append(scores)
    return found


@pytest.mark.parametrize("length", [120, 40])
def test_answers_come_back_exactly(tmp_path: Path, length: int) -> None:
    """From the labels of the windows, for every kind of tokenizer, in one window and in several."""
    qas = [question(f"q{number}", text) for number, text in enumerate(ANSWERS)]
    path = squad(tmp_path / "a.json", (CONTEXT, qas))
    for kind, tokenizer in tokenizers(tmp_path).items():
        settings = NAME | {"max_length": length, "doc_stride": 7, "max_query_length": 6}
        task = task_of(tokenizer, settings, {"train": path})
        examples = task.examples("train")
        instances = task.instances(examples, train=True)
        if length == 40:
            assert len(instances) > len(examples), kind
        else:
            assert len(instances) == len(examples), kind
        labeled = 0
        for instance in instances:
            (feature,) = instance.features
            assert len(feature.tokens) <= length
            assert feature.rows.tolist() == list(range(len(feature.tokens)))
            assert len(instance.spans) == len(feature.tokens) - instance.offset - 1
            assert set(feature.types[instance.offset :].tolist()) == {1}
            if instance.label.any():
                labeled += 1
                first, last = instance.label - instance.offset
                begin, end = instance.spans[first, 0], instance.spans[last, 1]
                assert CONTEXT[begin:end] == ANSWERS[instance.example], kind
        assert labeled >= len(ANSWERS)
        predictions = task.predictions(examples, instances, sure_logits(instances))
        for prediction, text in zip(predictions, ANSWERS, strict=True):
            assert prediction["answer"] == text, kind
            assert CONTEXT[prediction["start"] : prediction["end"]] == text
        assert task.metrics(examples, predictions) == {"f1": 100.0, "exact_match": 100.0}


def test_sequences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    example = SpanExample("x", "w", "predict", "who sat?", "the cat sat")
    task = task_of(tokenizer, NAME | {"max_length": 32})
    (instance,) = task.instances([example], train=False)
    (feature,) = instance.features
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    query = tokenizer.encode("who sat?")
    assert feature.tokens.tolist() == [cls, *query, sep, *tokenizer.encode("the cat sat"), sep]
    assert feature.types.tolist() == [0] * (len(query) + 2) + [1] * 4
    assert instance.label.tolist() == [IGNORED, IGNORED]
    assert (task.head.kind, task.head.outputs) == ("span", 2)


@pytest.mark.parametrize(("length", "stride"), [(24, 5), (16, 7), (64, 20)])
def test_windows_equal_transformers(tmp_path: Path, tokenizer: Tokenizer, length: int, stride: int) -> None:
    peer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    query, context = "who?", "The cat sat on a (big) MAT, 12.5 km; then nothing."
    task = task_of(tokenizer, NAME | {"max_length": length, "doc_stride": stride})
    instances = task.instances([task.example_from({"question": query, "context": context}, "line 1")], train=False)
    expected = peer(
        query,
        context,
        truncation="only_second",
        max_length=length,
        stride=max(0, length - 3 - 4 - stride),  # there, by how much windows overlap
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [instance.features[0].tokens.tolist() for instance in instances] == expected["input_ids"]
    assert [instance.features[0].types.tolist() for instance in instances] == expected["token_type_ids"]
    for number, instance in enumerate(instances):
        offsets = [
            span for span, part in zip(expected["offset_mapping"][number], expected.sequence_ids(number)) if part
        ]
        assert instance.spans.tolist() == [list(span) for span in offsets]


def test_candidates_and_probabilities(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context = "the cat sat mat"
    task = task_of(tokenizer, NAME | {"n_best": 3, "max_answer_length": 2})
    examples = [task.example_from({"question": "q", "context": context, "id": 5}, "line 1")]
    (instance,) = instances = task.instances(examples, train=False)
    scores = np.full((len(instance.features[0].tokens), 2), -50.0, dtype=np.float32)
    scores[instance.offset + np.array([0, 1, 2]), 0] = [3.0, 1.0, 0.0]
    scores[instance.offset + np.array([0, 1, 3]), 1] = [1.0, 2.0, 9.0]
    scores[0] = 30.0  # the scores of no answer count for nothing in version 1.1
    (prediction,) = task.predictions(examples, instances, [scores])
    # "the cat sat mat" would score 12, but has four tokens.
    expected = [("sat mat", 9.0), ("the cat", 5.0), ("the", 4.0)]
    assert [entry["text"] for entry in prediction["nbest"]] == [text for text, _ in expected]
    weights = np.exp([score for _, score in expected])
    assert [e["probability"] for e in prediction["nbest"]] == pytest.approx((weights / weights.sum()).tolist())
    assert (prediction["id"], prediction["answer"], prediction["start"], prediction["end"]) == (5, "sat mat", 8, 15)
    assert prediction["probability"] == prediction["nbest"][0]["probability"]
    assert "null_odds" not in prediction


def test_the_answer_with_most_expected_f1(tokenizer: Tokenizer) -> None:
    """Two parts of the text are a little likelier than all of it, which shares its words with both."""
    context = "the cat sat mat"
    for no_answer in (False, True):
        task = task_of(tokenizer, NAME | {"n_best": 3, "answer_by": "expected_f1", "no_answer": no_answer})
        examples = [task.example_from({"question": "q", "context": context}, "line 1")]
        (instance,) = instances = task.instances(examples, train=False)
        scores = np.full((len(instance.features[0].tokens), 2), -50.0, dtype=np.float32)
        scores[instance.offset + np.array([1, 3]), 0] = [0.0, 0.1]
        scores[instance.offset + np.array([1, 3]), 1] = [0.1, 0.0]
        scores[0] = -50.0
        (prediction,) = task.predictions(examples, instances, [scores])
        found = {entry["text"]: entry for entry in prediction["nbest"] if entry["text"]}
        assert sorted(found) == ["cat", "cat sat mat", "mat"]
        weights = np.exp([0.1, 0.0, 0.1])
        likely, whole, _ = weights / weights.sum()
        assert found["cat"]["probability"] == pytest.approx(likely)
        assert found["cat sat mat"]["expected_f1"] == pytest.approx(whole + 2 * likely * 0.5)
        assert found["cat"]["expected_f1"] == pytest.approx(likely + whole * 0.5)
        assert (prediction["answer"], prediction["start"], prediction["end"]) == ("cat sat mat", 4, 15)
        assert prediction["probability"] == found["cat sat mat"]["probability"] < found["cat"]["probability"]
        if no_answer:
            assert prediction["best_answer"] == "cat sat mat"
            assert prediction["null_odds"] == pytest.approx(-100.0 - 0.1, abs=1e-5), "against the likeliest answer"


def test_windows_are_joined_by_the_widest_context(tokenizer: Tokenizer) -> None:
    """A window that sees little around a token does not answer with it, however sure it is."""
    task = task_of(tokenizer, NAME | {"max_length": 16, "doc_stride": 4, "max_query_length": 3})
    context = " ".join("abcdefghijklmnop")
    examples = [task.example_from({"question": "q", "context": context}, "line 1")]
    instances = task.instances(examples, train=False)
    assert [len(instance.spans) for instance in instances] == [12, 12]
    logits = [np.zeros((16, 2), dtype=np.float32) for _ in instances]
    place = 4  # "e", first in the second window, fifth in the first
    logits[0][instances[0].offset + place] = 3.0
    logits[1][instances[1].offset] = 9.0
    (prediction,) = task.predictions(examples, instances, logits)
    assert prediction["answer"] == "e"
    assert prediction["nbest"][0]["start_logit"] == 3.0


def test_same_texts_are_one_candidate(tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer, NAME | {"max_answer_length": 1})
    examples = [task.example_from({"question": "q", "context": "the cat the mat the"}, "line 1")]
    instances = task.instances(examples, train=False)
    scores = np.zeros((len(instances[0].features[0].tokens), 2), dtype=np.float32)
    scores[instances[0].offset + 2] = 1.0
    (prediction,) = task.predictions(examples, instances, [scores])
    assert sorted(entry["text"] for entry in prediction["nbest"]) == ["cat", "mat", "the"]
    assert (prediction["answer"], prediction["start"]) == ("the", 8)


def version_2(tmp_path: Path, tokenizer: Tokenizer, **settings: Any) -> tuple[Any, list[SpanExample]]:
    impossible = {"id": "n", "question": "q", "answers": [], "is_impossible": True, "plausible_answers": [{}]}
    path = squad(tmp_path / "b.json", (CONTEXT, [question("y", "the cat", is_impossible=False), impossible]))
    task = task_of(tokenizer, NAME | {"no_answer": True} | settings, {"train": path})
    return task, task.examples("train")


def test_no_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task, examples = version_2(tmp_path, tokenizer)
    instances = task.instances(examples, train=True)
    assert instances[1].label.tolist() == [0, 0]
    logits = sure_logits(instances)
    yes, no = task.predictions(examples, instances, logits)
    assert (yes["answer"], yes["null_odds"]) == ("the cat", -20.0)
    assert (no["answer"], no["start"], no["end"], no["null_odds"]) == ("", None, None, 20.0)
    assert no["best_answer"]
    assert no["nbest"][0]["text"] == ""
    assert task.metrics(examples, [yes, no])["HasAns_f1"] == 100.0
    assert set(task.metrics(examples, [yes, no])) == set(task.metrics_names)
    # The model is too shy by 25: it says that no question has an answer, until the threshold is found.
    for scores in logits:
        scores[0] += 25.0 / 2
    predictions = task.predictions(examples, instances, logits)
    assert [p["answer"] for p in predictions] == ["", ""]
    assert task.metrics(examples, predictions)["best_f1"] == 100.0
    found = task.calibrated(examples, predictions)
    assert found.null_threshold == 5.0
    assert task.metric == "best_f1", "the threshold is found after training, so checkpoints compete with their best one"
    assert [p["answer"] for p in found.predictions(examples, instances, logits)] == ["the cat", ""]
    assert task.null_threshold == 0.0
    restored = restore_task(found.describe(), tokenizer)
    assert [p["answer"] for p in restored.predictions(examples, instances, logits)] == ["the cat", ""]
    given, _ = version_2(tmp_path, tokenizer, null_threshold=-1.0)
    assert given.metric == "f1"
    assert given.calibrated(examples, predictions) is given


def test_windows_agree_on_no_answer(tokenizer: Tokenizer) -> None:
    """The score of no answer is the least of all windows'."""
    task = task_of(tokenizer, NAME | {"no_answer": True, "max_length": 16, "doc_stride": 6, "max_query_length": 3})
    examples = [task.example_from({"question": "q", "context": " ".join("abcdefghijklmnop")}, "line 1")]
    instances = task.instances(examples, train=False)
    logits = [np.zeros((len(instance.features[0].tokens), 2), dtype=np.float32) for instance in instances]
    for scores, value in zip(logits, (8.0, -3.0), strict=True):
        scores[0] = value
    logits[0][instances[0].offset] = 1.0
    (prediction,) = task.predictions(examples, instances, logits)
    assert prediction["null_odds"] == -6.0 - 2.0
    assert prediction["answer"] == "a"


@pytest.mark.parametrize("no_answer", [True, False])
def test_texts_without_tokens(tokenizer: Tokenizer, no_answer: bool) -> None:
    task = task_of(tokenizer, NAME | {"no_answer": no_answer})
    examples = [task.example_from({"question": "", "context": text}, "line 1") for text in ("", " \u200b ")]
    instances = task.instances(examples, train=False)
    assert [len(instance.features[0].tokens) for instance in instances] == [3, 3]
    predictions = task.predictions(examples, instances, [np.full((3, 2), np.nan, dtype=np.float32)] * 2)
    assert [(p["answer"], p["start"], p["probability"]) for p in predictions] == [("", None, 1.0)] * 2
    assert "NaN" not in json.dumps(predictions)


def test_submissions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task, examples = version_2(tmp_path, tokenizer)
    predictions = task.predictions(examples, instances := task.instances(examples, train=False), sure_logits(instances))
    paths = task.write_submission(examples, predictions, tmp_path / "out")
    names = ["train_predictions.json", "train_nbest_predictions.json", "train_null_odds.json"]
    assert [path.name for path in paths] == names
    answers, nbest, odds = (json.loads(path.read_text()) for path in paths)
    assert answers == {"y": "the cat", "n": ""}
    assert odds == {"y": -20.0, "n": 20.0}
    assert nbest["n"][0]["text"] == ""
    assert {"text", "probability", "start_logit", "end_logit"} <= set(nbest["y"][0])


def test_articles_stay_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paragraphs = [(CONTEXT, [question(f"{a}.{n}", "mat") for n in range(3)]) for a in range(6)]
    path = squad(tmp_path / "a.json", *paragraphs)
    task = task_of(tokenizer, NAME, {"train": path, "valid_fraction": 0.3})
    kept, held = ([e.id for e in task.examples(split)] for split in ("train", "valid"))
    assert (len(kept), len(held)) == (12, 6)
    assert not {name.split(".")[0] for name in kept} & {name.split(".")[0] for name in held}


BAD = [
    ({"answers": [{"text": "dog", "answer_start": 0}]}, "answer 'dog' is nowhere in the context"),
    ({"answers": [{"text": "cat", "answer_start": 5}]}, "answer 'cat' is at character 4, not at 5"),
    ({"answers": [{"text": "cat", "answer_start": -1}]}, "at character 4, not at -1"),
    ({"answers": [{"text": "cat", "answer_start": "4"}]}, "is '4', expected a whole number"),
    ({"answers": [{"text": " ", "answer_start": 3}]}, "one of its answers is empty"),
    ({"answers": [{"answer_start": 3}]}, 'no "text"'),
    ({"answers": []}, r"set task\.no_answer"),
    ({"answers": "cat"}, '"answers" are not a list'),
    ({"is_impossible": True}, r"set task\.no_answer"),
    ({"is_impossible": "no"}, "expected true or false"),
    ({"question": None}, '"question" is not text'),
    ({"question": "\ud800"}, "surrogate"),
    ({"id": "good"}, "is that of an earlier question"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_questions(tmp_path: Path, tokenizer: Tokenizer, change: dict, reason: str) -> None:
    path = squad(tmp_path / "a.json", (CONTEXT, [question("good", "cat"), question("bad", "cat") | change]))
    with pytest.raises(UserError, match=rf"data\[0\]\.paragraphs\[0\]\.qas\[1\] \(id \w+\): .*{reason}"):
        task_of(tokenizer, NAME, {"train": path}).examples("train")
    task = task_of(tokenizer, NAME, {"train": path, "on_bad_row": "skip"})
    assert [example.id for example in task.examples("train")] == ["good"]
    assert task.bad_rows.count == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"data": [', "is not JSON"),
        (b'{"data": {}}', 'a list under "data"'),
        (b"[]", "is empty"),
        (b'{"data": "\xff"}', "not UTF-8 at byte 10"),
    ],
)
def test_files_that_are_no_squad(tmp_path: Path, tokenizer: Tokenizer, content: bytes, reason: str) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=rf"a\.json .*{reason}"):
        task_of(tokenizer, NAME, {"train": path, "on_bad_row": "skip"}).examples("train")


def test_broken_parts_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = {"context": CONTEXT, "qas": [question("x", "cat")]}
    content = {
        "data": [{"title": "none"}, {"paragraphs": [good, {"qas": [question("y", "cat")]}, {"context": "c"}, 3]}]
    }
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(content).encode())
    task = task_of(tokenizer, NAME, {"train": path, "on_bad_row": "skip"})
    assert [example.id for example in task.examples("train")] == ["x"]
    assert task.bad_rows.count == 4
    assert f'{path} data[0]: it has no list under "paragraphs"' in task.bad_rows.reasons


def test_test_files_need_no_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    unlabeled = {"id": "x", "question": "q"}
    path = squad(tmp_path / "a.json", (CONTEXT, [unlabeled]))
    task = task_of(tokenizer, NAME, {"test": path})
    examples = task.examples("test")
    instances = task.instances(examples, train=False)
    assert instances[0].label.tolist() == [IGNORED, IGNORED]
    predictions = task.predictions(examples, instances, [np.zeros((len(instances[0].features[0].tokens), 2))])
    assert task.metrics(examples, predictions) == {}
    with pytest.raises(UserError, match='no "answers"'):
        task_of(tokenizer, NAME, {"valid": path}).examples("valid")


def test_bad_rows_of_a_stream(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match='line 4 has no "context"'):
        task_of(tokenizer, NAME).example_from({"question": "q"}, "line 4")
    with pytest.raises(UserError, match="leaves no room for the text"):
        task_of(tokenizer, NAME | {"max_length": 16, "max_query_length": 13})
