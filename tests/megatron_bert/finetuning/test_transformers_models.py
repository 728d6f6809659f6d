# SPDX-License-Identifier: Apache-2.0
"""Models that transformers has fine-tuned and saved are scored and asked as they are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_bert.cli import main
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.finetuning.inference import predict_stream
from megatron_bert.finetuning.saved import load_task
from parallel.errors import UserError
from tests.megatron_bert.data.support import small_vocabulary
from tests.megatron_bert.finetuning.roberta_support import ROBERTA_SIZES
from tests.megatron_bert.finetuning.support import WORDS
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer

LIKE_BERT, LIKE_ROBERTA = ("Bert", "MegatronBert"), ("Roberta", "XLMRoberta", "IBert")
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("SequenceClassification", {"id2label": {0: "no", 1: "maybe", 2: "yes"}}),
    "multi": ("SequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "regression": ("SequenceClassification", {"num_labels": 1}),
    "token": ("TokenClassification", {"id2label": {0: "B-X", 1: "O", 2: "I-X"}}),
    "choice": ("MultipleChoice", {}),
    "span": ("QuestionAnswering", {}),
}
#: The same and the head of pretraining.
MODELS = HEADS | {"masked": ("MaskedLM", {})}


def make_model(folder: Path, family: str, kind: str, **changes: Any) -> Path:
    """A directory that transformers has saved, with random weights."""
    roberta = family in LIKE_ROBERTA
    if roberta:
        write_roberta_tokenizer(folder, [" ".join(WORDS)] * 3, vocab_size=460)
    else:
        save_tokenizer(load_tokenizer(small_vocabulary(folder, WORDS)), folder, 32)
    head, classes = MODELS[kind]
    sizes = dict(ROBERTA_SIZES) if roberta else ROBERTA_SIZES | {"type_vocab_size": 2, "pad_token_id": 0}
    sizes |= {"vocab_size": load_tokenizer(folder).vocab_size, **classes, **changes}
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}For{head}")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # biases too, which would be 0
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(folder: Path, head: str, *texts: Any, choices: bool = False, **options: Any) -> tuple[Any, Any]:
    """transformers' inputs and outputs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder).eval()
    inputs = tokenizer(*texts, return_tensors="pt", **options)
    given = {name: value[None] for name, value in inputs.items()} if choices else dict(inputs)
    return inputs, model(**given)


def answer_to(folder: Path, **row: Any) -> dict[str, Any]:
    answers = io.StringIO()
    assert predict_stream(folder, io.StringIO(json.dumps(row)), answers, batch_size=4, device="cpu") == 0
    return json.loads(answers.getvalue())


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*LIKE_BERT, *LIKE_ROBERTA])
@pytest.mark.parametrize("kind", HEADS)
def test_answers_are_those_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    folder, head = make_model(tmp_path, family, kind), HEADS[kind][0]
    words = "w7 w31 w2 w44 w60"
    if kind in ("single", "multi", "regression"):
        for texts in ({"text": words}, {"text": words, "text_pair": "w9 w8 w50"}):
            scores = logits_of(folder, head, *texts.values())[1].logits[0]
            found = answer_to(folder, **texts)
            if kind == "regression":
                close([found["value"]], scores)
            else:
                close(
                    list(found["probabilities"].values()), scores.softmax(0) if kind == "single" else scores.sigmoid()
                )
                named = {"single": ["no", "maybe", "yes"], "multi": ["LABEL_0", "LABEL_1", "LABEL_2"]}[kind]
                assert list(found["probabilities"]) == named
    elif kind == "token":
        inputs, output = logits_of(folder, head, words)
        starts = [inputs.char_to_token(words.index(word)) for word in words.split()]
        chances = output.logits[0, starts].softmax(dim=1)
        found = answer_to(folder, text=words)
        close(found["probabilities"], chances.max(dim=1).values)
        assert found["tags"] == [["B-X", "O", "I-X"][number] for number in chances.argmax(dim=1)]
    elif kind == "choice":
        choices = ["w9", "w8 w50 w51", "w3 w4"]
        output = logits_of(folder, head, [words] * 3, choices, choices=True, padding=True)[1]
        close(answer_to(folder, question=words, choices=choices)["probabilities"], output.logits[0].softmax(0))
    else:
        inputs, output = logits_of(folder, head, "w1 w2", words)
        inside = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
        pairs = output.start_logits[0, inside][:, None] + output.end_logits[0, inside][None]
        best = pairs.masked_fill(~torch.ones_like(pairs).triu().bool(), -torch.inf).max()
        found = answer_to(folder, question="w1 w2", context=words)["nbest"][0]
        close(found["start_logit"] + found["end_logit"], best)


def test_evaluate_names_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    folder = make_model(tmp_path / "model", "Bert", "single")
    rows = [{"text": f"w{number} w3", "label": label} for number, label in enumerate(["no", "yes", "maybe"])]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["evaluate", str(folder), f"data.test={tmp_path / 'test.jsonl'}", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "test: 3 examples; loss" in said.out
    assert "is a BertForSequenceClassification, used for classification of no, maybe, yes" in said.err
    assert "at most 32 tokens" in said.err
    answers = [json.loads(line) for line in (tmp_path / "out" / "predictions_test.jsonl").open(encoding="utf-8")]
    assert [row["gold_label"] for row in answers] == ["no", "yes", "maybe"]


def test_settings_of_the_task_may_be_changed(tmp_path: Path) -> None:
    """Class numbers of the model and of the task are matched by the names of the classes."""
    names = {0: "entailment", 1: "neutral", 2: "contradiction"}
    folder = make_model(tmp_path, "Roberta", "single", id2label=names)
    task = load_task(folder, task={"name": "mnli", "max_length": 16}).task
    assert (task.labels, task.max_length) == (("contradiction", "entailment", "neutral"), 16)
    row = {"text": "w1 w2", "text_pair": "w3"}
    scores = logits_of(folder, "SequenceClassification", *row.values())[1].logits[0].softmax(0)
    answers = io.StringIO()
    predict_stream(
        folder, io.StringIO(json.dumps(row)), answers, batch_size=1, device="cpu", overrides=["task.name=mnli"]
    )
    found = json.loads(answers.getvalue())["probabilities"]
    close([found[names[number]] for number in range(3)], scores)


@pytest.mark.parametrize(
    ("kind", "changes", "task", "expected"),
    [
        ("single", {}, {"name": "token_classification"}, "is a BertForSequenceClassification: give a task with such"),
        ("single", {}, {"name": "sst2"}, "fine-tuned for the classes no, maybe, yes, but the task has"),
        ("single", {}, {"max_length": 64}, r"max_length is 64, but the model takes at most 3[24]"),
        ("single", {}, {"maximum": 64}, "the settings of the task.*maximum"),
        ("regression", {"num_labels": 2, "problem_type": "regression"}, {}, "predicts 2 numbers for each text"),
        ("token", {"id2label": {0: "NOUN", 1: "VERB"}}, {}, "has a class 'NOUN', .* which tags its 2 classes are"),
    ],
)
def test_what_does_not_fit(
    kind: str, changes: dict[str, Any], task: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        load_task(make_model(tmp_path, "Bert", kind, **changes), task=task)


def test_classes_without_names_are_the_tags_that_are_given(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "Bert", "token", id2label={number: f"LABEL_{number}" for number in range(5)})
    with pytest.raises(UserError, match=r"'LABEL_0', .*, such as task\.labels=\[O,B-PER,I-PER\]"):
        load_task(folder)
    tags = ["O", "B-PER", "L-PER", "I-PER", "U-PER"]
    task = load_task(folder, task={"labels": tags}).task
    assert task.labels == tuple(tags)
    assert task.settings.scheme == "BILOU"


def test_settings_that_mean_nothing_here(tmp_path: Path) -> None:
    """As published models have them."""
    folder = make_model(tmp_path, "Bert", "single")
    change_config(
        folder, directionality="bidi", pooler_fc_size=768, language="english", name="Bert", padding="max_length"
    )
    assert load_task(folder).task.labels == ("no", "maybe", "yes")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "without the head of a task: fine-tune it"),
        ({"model_type": "distilbert"}, "has model_type 'distilbert': expected megatron-bert, bert, ibert"),
        ({"is_decoder": True}, "of a decoder \\(is_decoder\\): only encoders"),
    ],
)
def test_other_models(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "Bert", "single")
    change_config(folder, **changes)
    with pytest.raises(UserError, match=expected):
        load_task(folder)
