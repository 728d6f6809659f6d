# SPDX-License-Identifier: Apache-2.0
"""Question answering: the answer is a part of a text, or there is none (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_bert.data.tokenizers import SpannedTokens, Tokenizer
from megatron_bert.tasks.answer_windows import (
    Candidate,
    WindowInstance,
    answer_tokens,
    candidates,
    check_stride,
    widest_context,
    windows,
)
from megatron_bert.tasks.encoding import BERT, InputFormat, feature
from megatron_bert.tasks.metrics import softmax
from megatron_bert.tasks.settings import ColumnSettings, TaskDataSettings, TaskSettings
from megatron_bert.tasks.squad_files import QuestionReader, SpanExample, holds_articles
from megatron_bert.tasks.squad_metrics import Judged, best_threshold, expected_f1, squad_metrics
from megatron_bert.tasks.stream import name_of, text_of
from megatron_bert.tasks.task import IGNORED, Head, Prediction, Task
from parallel.errors import UserError
from parallel.whole_files import write_json

DOC_STRIDE, MAX_QUERY_LENGTH = 128, 64
NO_CANDIDATE_ODDS = 1e9
"""`null_odds` of a text in which no answer is possible, such as an empty one."""


class QuestionAnsweringTask(Task[SpanExample, WindowInstance]):
    """Start and end of the answer in a text, which is read in overlapping windows: [CLS] question [SEP] text [SEP].

    Rows of a stream have `question` and `context`. Predictions have `answer` (an exact part of the context, or ""),
    its characters `start` and `end` (None without answer), its `probability` among the candidates, and the candidates
    as `nbest`. With `answer_by` expected_f1 these have their `expected_f1`, and the answer is the one with most of it.
    With `no_answer` also `null_odds`, the score of no answer less that of the likeliest one, and the best one as
    `best_answer`; the answer is "" where the odds exceed the threshold.
    """

    def __init__(
        self, settings: TaskSettings, data: TaskDataSettings, tokenizer: Tokenizer, form: InputFormat = BERT
    ) -> None:
        super().__init__(settings, data, tokenizer, form)
        self.head = Head("span", 2)
        parts = ("HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact", "best_f1", "best_exact")
        # The threshold is found when training has ended: until then checkpoints compete with the best for each.
        searched = settings.no_answer and settings.null_threshold is None
        names = ("f1", "exact_match", *(parts if settings.no_answer else ()))
        self.choose_metric(names, default="best_f1" if searched else None)
        self.null_threshold = settings.null_threshold or 0.0
        self.max_query_length = self.longest_query(MAX_QUERY_LENGTH, "the text")
        least = self.max_length - form.pair_specials - self.max_query_length
        self.doc_stride = settings.doc_stride or min(DOC_STRIDE, least)
        check_stride(self.doc_stride, least, f"task.max_length {self.max_length} beside a question")
        self._readers: dict[str, QuestionReader] = {}

    def read(self, path: Path, split: str, numbers: Iterator[int]) -> list[SpanExample]:
        """The questions of one file."""
        if split not in self._readers:
            self._readers[split] = QuestionReader(self.data, split, self.settings.no_answer, self.bad_rows)
        return list(self._readers[split].read(path, numbers))

    def check_training_data(self, examples: Sequence[SpanExample]) -> None:
        """Names of columns are for rows: articles have none."""
        del examples
        files = self.data.files("train")
        if self.data.columns != ColumnSettings() and all(holds_articles(path) for path in files):
            raise UserError(f"data.columns is for rows, but {files[0]} holds SQuAD's articles: leave it out")

    def group(self, example: SpanExample) -> str:
        """Questions on one article stay together."""
        return example.article

    def example_from(self, row: Mapping[str, Any], where: str) -> SpanExample:
        """An example from `question` and `context`."""
        question, context = text_of(row, "question", where), text_of(row, "context", where)
        return SpanExample(name_of(row, where), where, "predict", question, context)

    def instances(self, examples: Sequence[SpanExample], *, train: bool) -> list[WindowInstance]:
        """One instance per window; windows without the (first) answer are labeled (0, 0), also for training."""
        contexts = list(dict.fromkeys(example.context for example in examples))
        encoded = dict(zip(contexts, self.tokenizer.encode_batch_with_spans(contexts), strict=True))
        questions = self.tokenizer.encode_batch([example.question for example in examples])
        instances = []
        for place, (example, question) in enumerate(zip(examples, questions, strict=True)):
            assert example.labeled or not train, f"{example.where} has no answer to train on"
            instances += self._windows(place, example, question[: self.max_query_length], encoded[example.context])
        return instances

    def _windows(
        self, place: int, example: SpanExample, question: list[int], found: SpannedTokens
    ) -> list[WindowInstance]:
        room = self.max_length - self.form.pair_specials - len(question)
        offset = 1 + len(question) + self.form.separators
        answer = None
        if example.answers:
            first = example.answers[0]
            answer = answer_tokens(found, first.start, first.start + len(first.text))
        spans = np.array(found.spans, dtype=np.int32).reshape(-1, 2)
        places = windows(len(found.ids), room, self.doc_stride)
        instances = []
        for (begin, end), widest in zip(places, widest_context(places), strict=True):
            label = (0, 0) if example.labeled else (IGNORED, IGNORED)
            if answer is not None and begin <= answer[0] and answer[1] < end:
                label = (answer[0] - begin + offset, answer[1] - begin + offset)
            sequence = feature(self.tokenizer, self.form, question, found.ids[begin:end])
            instances.append(
                WindowInstance((sequence,), np.array(label, dtype=np.int64), place, offset, spans[begin:end], widest)
            )
        return instances

    def predictions(
        self, examples: Sequence[SpanExample], instances: Sequence[WindowInstance], logits: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """The answer of each question, from all its windows."""
        found: list[list[Candidate]] = [[] for _ in examples]
        nothing: list[list[Candidate]] = [[] for _ in examples]
        for instance, given in zip(instances, logits, strict=True):
            # A model that has diverged still gives some answer.
            scores = np.nan_to_num(given.astype(np.float64), nan=-1e30, posinf=1e30, neginf=-1e30)
            found[instance.example] += candidates(
                instance, scores, self.settings.max_answer_length, self.settings.n_best
            )
            nothing[instance.example].append(Candidate(0, 0, float(scores[0, 0]), float(scores[0, 1])))
        return [
            self._prediction(
                example,
                ranked(options, example.context, self.settings.n_best),
                min(nulls, key=lambda null: null.score),
            )
            for example, options, nulls in zip(examples, found, nothing, strict=True)
        ]

    def _prediction(self, example: SpanExample, options: list[Candidate], null: Candidate) -> Prediction:
        entries: list[dict[str, Any]] = [
            {
                "text": example.context[option.begin : option.end],
                "start": option.begin,
                "end": option.end,
                "start_logit": option.start_logit,
                "end_logit": option.end_logit,
            }
            for option in options
        ]
        nothing: dict[str, Any] = {
            "text": "",
            "start": None,
            "end": None,
            "start_logit": null.start_logit,
            "end_logit": null.end_logit,
        }
        if self.settings.no_answer or not entries:
            entries.append(nothing)
        chances = softmax(np.array([entry["start_logit"] + entry["end_logit"] for entry in entries]))
        for entry, chance in zip(entries, chances.tolist(), strict=True):
            entry["probability"] = chance
        best = self._best(entries[: len(options)], chances) if options else None
        odds = null.score - options[0].score if options else NO_CANDIDATE_ODDS
        given = nothing if best is None or (self.settings.no_answer and odds > self.null_threshold) else best
        entries.sort(key=lambda entry: -entry["probability"])
        prediction: Prediction = {
            "id": example.id,
            "answer": given["text"],
            "start": given["start"],
            "end": given["end"],
            "probability": given["probability"],
            "nbest": entries,
        }
        if self.settings.no_answer:
            prediction |= {"null_odds": odds, "best_answer": best["text"] if best else ""}
        return prediction

    def _best(self, entries: list[dict[str, Any]], chances: np.ndarray) -> dict[str, Any]:
        """Which of the candidates, likeliest first, is the answer."""
        if self.settings.answer_by == "probability":
            return entries[0]
        expected = expected_f1([entry["text"] for entry in entries], chances[: len(entries)])
        for entry, value in zip(entries, expected.tolist(), strict=True):
            entry["expected_f1"] = value
        return entries[int(expected.argmax())]

    def shown(self, example: SpanExample) -> dict[str, Any]:
        """`question`, `context`, and `gold_answers`, the texts of the right answers, none where there is none."""
        gold = {"gold_answers": [answer.text for answer in example.answers]} if example.labeled else {}
        return {"question": example.question, "context": example.context} | gold

    def metrics(self, examples: Sequence[SpanExample], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Exact match and F1, 0 to 100, as SQuAD's scripts report them."""
        judged = self._judged(examples, predictions)
        return squad_metrics(judged, no_answer=self.settings.no_answer) if judged else {}

    def _judged(self, examples: Sequence[SpanExample], predictions: Sequence[Prediction]) -> list[Judged]:
        return [
            Judged(
                tuple(answer.text for answer in example.answers),
                prediction["answer"],
                prediction["best_answer"] if self.settings.no_answer else prediction["answer"],
                prediction["null_odds"] if self.settings.no_answer else 0.0,
            )
            for example, prediction in zip(examples, predictions, strict=True)
            if example.labeled
        ]

    def calibrated(self, examples: Sequence[SpanExample], predictions: Sequence[Prediction]) -> Self:
        """The task with the null threshold of the best F1, unless the settings give one."""
        judged = self._judged(examples, predictions)
        if not self.settings.no_answer or self.settings.null_threshold is not None or not judged:
            return self
        task = copy.copy(self)
        task.null_threshold = best_threshold(judged, "f1")[1]
        return task

    def _found(self) -> dict[str, Any]:
        lengths = {"doc_stride": self.doc_stride, "max_query_length": self.max_query_length}
        return {
            **super()._found(),
            **lengths,
            "null_threshold": self.null_threshold if self.settings.no_answer else None,
        }

    def write_submission(
        self, examples: Sequence[SpanExample], predictions: Sequence[Prediction], directory: Path
    ) -> list[Path]:
        """Write SPLIT_predictions.json and SPLIT_nbest_predictions.json, and SPLIT_null_odds.json with `no_answer`."""
        directory.mkdir(parents=True, exist_ok=True)
        keys = {"predictions": "answer", "nbest_predictions": "nbest"}
        if self.settings.no_answer:
            keys["null_odds"] = "null_odds"
        written = []
        for split in dict.fromkeys(example.split for example in examples):
            chosen = [p for e, p in zip(examples, predictions, strict=True) if e.split == split]
            for name, key in keys.items():
                path = directory / f"{split}_{name}.json"
                write_json(path, {prediction["id"]: prediction[key] for prediction in chosen})
                written.append(path)
        return written


def ranked(options: list[Candidate], context: str, count: int) -> list[Candidate]:
    """The best candidates of all windows, best first, each text once."""
    by_text: dict[str, Candidate] = {}
    for option in sorted(options, key=lambda option: (-option.score, option.begin, option.end)):
        by_text.setdefault(context[option.begin : option.end], option)
    return list(by_text.values())[:count]
