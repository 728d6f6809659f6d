# SPDX-License-Identifier: Apache-2.0
"""Token classification: a tag for every word, and the entities that tags mark."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import seqeval.metrics

from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.tasks import metrics
from megatron_bert.tasks.answer_windows import check_stride
from megatron_bert.tasks.class_weights import given_weights
from megatron_bert.tasks.conll_files import Sentence, WordsExample, columns_of_tags, joined, read_sentences
from megatron_bert.tasks.encoding import BERT, InputFormat, feature
from megatron_bert.tasks.rows import BadRows, RowError, as_json
from megatron_bert.tasks.settings import TaskDataSettings, TaskSettings
from megatron_bert.tasks.stream import name_of, text_of, texts_of
from megatron_bert.tasks.tables import FORMATS
from megatron_bert.tasks.tag_schemes import (
    OUTSIDE,
    all_tags,
    best_tags,
    check_tags,
    entities,
    entity_type,
    looks_like_tag,
    scheme_hint,
    scored,
)
from megatron_bert.tasks.task import IGNORED, Head, Instance, Prediction, Task
from megatron_bert.tasks.token_rows import TokenRows
from megatron_bert.tasks.words import pieces_of_words, split_words, word_windows
from parallel.errors import UserError
from parallel.whole_files import whole_file

TINY = 1e-30
"""Least probability of a tag when sequences of tags are compared."""


@dataclass(frozen=True)
class WordsInstance(Instance):
    """A window of a sentence.

    Attributes:
        words: int64 [R], the word of the sentence that each of the feature's rows stands for.
    """

    words: np.ndarray


class TokenClassificationTask(Task[WordsExample, WordsInstance]):
    """A tag for every word, from its first piece; sentences that are too long are read in overlapping windows.

    Rows of a stream have `text`, which is split into words at white space and punctuation, or the words as `tokens`.
    Predictions have `text`, `tokens`, `tags`, their `probabilities`, and `entities`: `type`, `text`, its characters
    `start` and `end`, and `probability`, the mean of its tags'. Tokens given as a list are joined by spaces.

    The labels are "O" and all tags of the scheme for the types of entity in the training file.
    """

    def __init__(
        self, settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT
    ) -> None:
        super().__init__(settings, data, tokenizer, form)
        room = self.max_length - 2
        self.doc_stride = settings.doc_stride or min(self.max_length // 2, room)
        check_stride(self.doc_stride, room, f"task.max_length {self.max_length}")
        self.labels = self._given_labels() if settings.labels is not None else self._find_labels()
        given_weights(settings.class_weights, self.labels)
        self.head = Head("token", len(self.labels))
        types = sorted({tag[2:] for tag in self.labels if tag != OUTSIDE} - {""})
        self.choose_metric(("f1", "precision", "recall", "accuracy", *(f"f1_{name}" for name in types)))

    def _given_labels(self) -> tuple[str, ...]:
        labels = self.settings.labels or []
        try:
            for tag in labels:
                entity_type(tag, self.settings.scheme)
        except RowError as reason:
            hint = scheme_hint([labels], "the labels", whole=False)
            raise UserError(f"task.labels: {reason}{hint}") from None
        if OUTSIDE not in labels:
            raise UserError('task.labels has no "O", the tag of words outside of entities: add it')
        return tuple(labels)

    def _find_labels(self) -> tuple[str, ...]:
        files = self.data.files("train")
        if not files:
            raise UserError("there is no training file to find tags in: set task.labels or data.train")
        types: set[str] = set()
        bad = BadRows("skip")  # reported when they are read for training, unless nothing is left
        for path in files:
            for sentence in self._sentences(path, "train", bad, itertools.count()):
                types |= {tag[2:] for tag in sentence.tags or () if tag != OUTSIDE}
        if not types:
            because = bad.reasons[0] if bad.reasons else "see task.scheme"
            raise UserError(f"{files[0]} marks no entity in the scheme {self.settings.scheme}: {because}")
        return all_tags(types, self.settings.scheme)

    def _sentences(self, path: Path, split: str, bad: BadRows, numbers: Iterator[int]) -> list[Sentence]:
        """The sentences of a file whose tags follow the scheme."""
        read, found = [], []
        for sentence in self._in_file(path, split, bad, numbers):
            try:
                read.append(self._named(path, sentence))
            except RowError as reason:
                bad.add(path, sentence.place, reason)
        for sentence in read:
            try:
                check_tags(sentence.tags or (), self.settings.scheme)
            except RowError as reason:
                where = f"{sentence.place} (the sentence that begins there)"
                hint = self._hint(path, [other.tags or () for other in read])
                if hint:
                    raise UserError(f"{path} {where}: {reason}{hint}") from None
                bad.add(path, where, reason)
                continue
            found.append(sentence)
        return found

    def _in_file(self, path: Path, split: str, bad: BadRows, numbers: Iterator[int]) -> Iterator[Sentence]:
        kind = self._format(path)
        tags_may_lack = split.startswith("test")
        if kind in ("csv", "tsv", "jsonl"):
            yield from TokenRows(self.data, tags_may_lack, bad, numbers).read(path, kind)
            return
        columns = self.data.columns
        token = 0 if columns.token is None else columns.token
        tag = -1 if columns.tag is None else columns.tag
        if columns.id is not None or isinstance(token, str) or isinstance(tag, str):
            raise UserError(
                f"{path} is read as a column file, in which data.columns.token and data.columns.tag are positions: "
                "give whole numbers and no data.columns.id, or set data.format: csv, tsv or jsonl"
            )
        yield from read_sentences(path, token, tag, tags_may_lack, bad, numbers)

    def _format(self, path: Path) -> Literal["csv", "tsv", "jsonl", "conll"]:
        kind = self.data.format
        if kind is None:
            by_ending = FORMATS.get(path.suffix.lower())
            kind = by_ending if by_ending in ("csv", "jsonl") else "conll"
        if kind not in ("csv", "tsv", "jsonl", "conll"):
            raise UserError(f"data.format {kind} is for multiple choice: set conll, jsonl, csv or tsv")
        if not self.data.header and kind not in ("csv", "tsv"):
            raise UserError(f"data.header: false is for csv and tsv, but {path} is read as {kind}: leave it out")
        return kind

    def _named(self, path: Path, sentence: Sentence) -> Sentence:
        """The sentence with the names of its tags, where the file has numbers."""
        labels = self.settings.labels
        tags = sentence.tags or ()
        if not any(tag.lstrip("-").isdecimal() for tag in tags):
            return sentence
        if labels is None:
            raise UserError(
                f"{path} {sentence.place} has numbers for tags: set task.labels to their names in the order of the "
                "numbers, such as task.labels=[O, B-PER, I-PER]"
            )
        wrong = next((tag for tag in tags if not (tag.isdecimal() and int(tag) < len(labels))), None)
        if wrong is not None:
            raise RowError(f"its tag {as_json(wrong)} is not the number of one of the {len(labels)} task.labels")
        return replace(sentence, tags=tuple(labels[int(tag)] for tag in tags))

    def _hint(self, path: Path, sentences: Sequence[Sequence[Any]]) -> str:
        """What to set so that the tags of a file fit; "" where nothing would do."""
        if any(looks_like_tag(tag) and tag != OUTSIDE for tags in sentences for tag in tags):
            return scheme_hint(sentences, "all tags of the file")
        tag = self.data.columns.tag
        hint = f"; no tag of the file is one: set data.columns.tag (now {-1 if tag is None else tag}"
        places = columns_of_tags(path) if self._format(path) == "conll" else []
        return hint + (f") to {' or '.join(map(str, places))}" if places else ") to the column of the tags")

    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[WordsExample]:
        """The sentences of one file."""
        examples = []
        for sentence in self._sentences(path, split, self.bad_rows, numbers):
            unknown = next((tag for tag in sentence.tags or () if tag not in self.labels), None)
            if unknown is not None:
                reason = RowError(f'its tag "{unknown}" is unknown (known: {", ".join(self.labels)})')
                self.bad_rows.add(path, f"{sentence.place} (the sentence that begins there)", reason)
                continue
            text, words = joined(sentence.words)
            where = f"{path} {sentence.place}"
            examples.append(WordsExample(sentence.name, where, split, text, words, sentence.tags))
        return examples

    def example_from(self, row: Mapping[str, Any], where: str) -> WordsExample:
        """An example from `tokens`, or from `text`."""
        name = name_of(row, where)
        if row.get("tokens") is None:
            text = text_of(row, "text", where)
            return WordsExample(name, where, "predict", text, split_words(text))
        return WordsExample(name, where, "predict", *joined(texts_of(row, "tokens", where)))

    def instances(self, examples: Sequence[WordsExample], *, train: bool) -> list[WordsInstance]:
        """One instance per window; every word is in the rows of exactly one of them."""
        encoded = self.tokenizer.encode_batch_with_spans([example.text for example in examples])
        number = {tag: place for place, tag in enumerate(self.labels)}
        room = self.max_length - 2
        instances = []
        for place, (example, found) in enumerate(zip(examples, encoded, strict=True)):
            assert example.tags is not None or not train, f"{example.where} has no tags to train on"
            # A word of endless pieces must leave room for its neighbors.
            pieces = pieces_of_words(found, example.words, self.tokenizer.unk_id, max(1, room // 2))
            for window in word_windows([len(word.ids) for word in pieces], room, self.doc_stride):
                ids: list[int] = []
                first = {}
                for word in range(window.begin, window.end):
                    first[word] = 1 + len(ids) + pieces[word].first
                    ids += pieces[word].ids
                sequence = feature(self.tokenizer, self.form, ids, None, rows=[first[word] for word in window.own])
                label = [IGNORED if example.tags is None else number[example.tags[word]] for word in window.own]
                words = np.array(window.own, dtype=np.int64)
                instances.append(WordsInstance((sequence,), np.array(label, dtype=np.int64), place, words))
        return instances

    def predictions(
        self, examples: Sequence[WordsExample], instances: Sequence[WordsInstance], logits: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """Tags and entities of each sentence."""
        chances = [np.zeros((len(example.words), self.head.outputs)) for example in examples]
        for instance, scores in zip(instances, logits, strict=True):
            if len(instance.words):
                chances[instance.example][instance.words] = metrics.softmax(scores)
        return [self._prediction(*of_one) for of_one in zip(examples, chances, strict=True)]

    def _prediction(self, example: WordsExample, table: np.ndarray) -> Prediction:
        if self.settings.decoding == "constrained":
            numbers = best_tags(np.log(np.maximum(table, TINY)), self.labels, self.settings.scheme)
        else:
            numbers = table.argmax(axis=1).tolist()
        tags = [self.labels[number] for number in numbers]
        chances = [float(row[number]) for row, number in zip(table, numbers, strict=True)]
        found = []
        for span in entities(tags, self.settings.scheme):
            begin, end = example.words[span.begin][0], example.words[span.end - 1][1]
            mean = sum(chances[span.begin : span.end]) / (span.end - span.begin)
            text = example.text[begin:end]
            found.append({"type": span.type, "text": text, "start": begin, "end": end, "probability": mean})
        return {
            "id": example.id,
            "text": example.text,
            "tokens": [example.text[begin:end] for begin, end in example.words],
            "tags": tags,
            "probabilities": chances,
            "entities": found,
        }

    def shown(self, example: WordsExample) -> dict[str, Any]:
        """`gold_tags`; the text and its words are in the prediction."""
        return {} if example.tags is None else {"gold_tags": list(example.tags)}

    def metrics(self, examples: Sequence[WordsExample], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Precision, recall and F1 of whole entities by seqeval, strict for the scheme, and accuracy of the tags."""
        labeled = [(e.tags, p) for e, p in zip(examples, predictions, strict=True) if e.tags]
        if not labeled:
            return {}
        pairs = [(tags, p["tags"]) for tags, p in labeled]
        scheme = self.settings.scheme
        kind = scored([], scheme)[1]
        true, given = [scored(t, scheme)[0] for t, _ in pairs], [scored(p, scheme)[0] for _, p in pairs]
        report: dict[str, dict[str, float]] = {}
        # Without any entity there is nothing to average over.
        if any(set(tags) - {OUTSIDE} or p["entities"] for tags, p in labeled):
            report = seqeval.metrics.classification_report(
                true, given, mode="strict", scheme=kind, output_dict=True, zero_division=0
            )
        overall = report.get("micro avg", {})
        same = [tag == predicted for tags, p in pairs for tag, predicted in zip(tags, p, strict=True)]
        found = {
            "f1": float(overall.get("f1-score", 0.0)),
            "precision": float(overall.get("precision", 0.0)),
            "recall": float(overall.get("recall", 0.0)),
            "accuracy": sum(same) / len(same),
        }
        by_type = (name for name in self.metrics_names if name.startswith("f1_"))
        return found | {name: float(report.get(name[3:], {}).get("f1-score", 0.0)) for name in by_type}

    def confusion(
        self, examples: Sequence[WordsExample], predictions: Sequence[Prediction]
    ) -> tuple[tuple[str, ...], np.ndarray] | None:
        """Counts of true and predicted tags of words."""
        pairs = [(e.tags, p["tags"]) for e, p in zip(examples, predictions, strict=True) if e.tags]
        if not pairs:
            return None
        true = [self.labels.index(tag) for tags, _ in pairs for tag in tags]
        given = [self.labels.index(tag) for _, tags in pairs for tag in tags]
        return self.labels, metrics.confusion_matrix(true, given, len(self.labels))

    def _found(self) -> dict[str, Any]:
        return {**super()._found(), "labels": list(self.labels), "doc_stride": self.doc_stride}

    def write_submission(
        self, examples: Sequence[WordsExample], predictions: Sequence[Prediction], directory: Path
    ) -> list[Path]:
        """Write SPLIT.conll: columns word, tag where known, predicted tag, separated by tabs."""
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for split in dict.fromkeys(example.split for example in examples):
            path = directory / f"{split}.conll"
            with whole_file(path) as file:
                for example, prediction in zip(examples, predictions, strict=True):
                    if example.split != split:
                        continue
                    columns = [prediction["tokens"], *([example.tags] if example.tags else []), prediction["tags"]]
                    file.writelines("\t".join(cells) + "\n" for cells in zip(*columns, strict=True))
                    file.write("\n")
            written.append(path)
        return written
