# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a RoBERTa that transformers has made: layouts, what is saved, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import megatron_bert
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.inspection import inspect
from megatron_bert.finetuning.batches import collate_instances
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.inference import evaluate_files, predict_stream
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.start import encoder_config, find_tokenizer
from megatron_bert.finetuning.weights import load_encoder, load_finetuned
from megatron_bert.model.configuration import numbered_labels
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.tasks.encoding import Feature
from megatron_bert.tasks.task import Instance
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from tests.megatron_bert.finetuning.roberta_support import make_roberta, make_roberta_run
from tests.megatron_bert.finetuning.support import (
    HEADS,
    run_settings,
    write_answers,
    write_entities,
    write_questions,
)
from tests.megatron_bert.finetuning.test_layouts import TASKS, LayoutRuns, compare, run
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows

#: Which layouts are compared, by task.
CHOSEN = {
    "classification": ("tensor", "pipeline", "data"),
    "multiple_choice": ("sequence",),
    "question_answering": ("sharded",),
    "token_classification": ("zero_bubble",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    make_roberta_run(folder)
    write_questions(folder / "questions.jsonl", 16, 3)
    write_answers(folder / "answers.json", 16, 4)
    write_entities(folder / "entities.conll", 16, 5)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one process for each task."""
    place = tmp_path_factory.mktemp("trained")
    for task in TASKS:
        run(folder, place / task, task, {})
    return {task: place / task for task in TASKS}


@pytest.fixture(scope="module")
def layouts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LayoutRuns:
    return LayoutRuns(folder, tmp_path_factory.mktemp("layouts"), CHOSEN)


@pytest.mark.parametrize("task", TASKS)
def test_every_layout_gives_the_curve_of_one_process(trained: dict[str, Path], layouts: LayoutRuns, task: str) -> None:
    expected = rows(trained[task])
    assert sum("loss" in row for row in expected) == 3
    for name in CHOSEN[task]:
        compare(rows(layouts(task) / name), expected)


def test_bfloat16_and_accumulation(folder: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    expected = rows(trained["classification"])
    compare(run(folder, tmp_path / "small", "classification", {"training__micro_batch_size": 2}), expected)
    found = run(folder, tmp_path / "bfloat16", "classification", {"precision__compute": "bfloat16"})
    losses = [[row["loss"] for row in some if "loss" in row] for some in (found, expected)]
    # Eight bits of mantissa through four layers; the loss is about 1.
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0] != losses[1]


class KilledError(Exception):
    """Stands for a killed process."""


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"checkpoint__every": 1, "checkpoint__keep": 0}
    expected = run(folder, tmp_path / "whole", "classification", changes)
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == 2:
            raise KilledError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", train_step)
        with pytest.raises(KilledError):
            run(folder, tmp_path / "killed", "classification", changes)
    assert "sequences (a, b, c)" in str(inspect(tmp_path / "killed"))
    assert run(folder, tmp_path / "killed", "classification", changes) == expected
    last = Path("checkpoints") / "step_00000003"
    assert_same_checkpoint(tmp_path / "killed" / last, tmp_path / "whole" / last)


# ---------------------------------------------------------------- what is saved


def test_transformers_gives_the_predictions_of_the_run(folder: Path, trained: dict[str, Path]) -> None:
    model = trained["classification"] / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    assert type(theirs).__name__ == "IBertForSequenceClassification"
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    ours = megatron_bert.IBertForSequenceClassification.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.model_max_length == 32
    predicted = [
        json.loads(line) for line in (trained["classification"] / "predictions_valid.jsonl").open(encoding="utf-8")
    ]
    texts = [json.loads(line)["text"] for line in (folder / "valid.jsonl").open(encoding="utf-8")]
    for text, prediction in zip(texts, predicted, strict=True):
        given = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits, mine = theirs(**given).logits[0], ours(**given).logits[0]
        torch.testing.assert_close(mine, logits, rtol=1e-5, atol=1e-5)
        expected = dict(zip("abc", logits.softmax(dim=0).tolist(), strict=True))
        assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_and_predict(folder: Path, trained: dict[str, Path], task: str) -> None:
    results = read_results(trained[task])
    assert results is not None
    valid = TASKS[task].get("data", {}).get("valid", "valid.jsonl")
    again = evaluate_files(trained[task], [f"data.valid={folder / valid}"], output=None, batch_size=5, device="cpu")
    assert again["valid"] == pytest.approx(results["splits"]["valid"], rel=1e-5)
    row = {"text": "w1 w31", "question": "w1 w2", "choices": ["w41", "w51"], "context": "w40 w41 w3"}
    answers = io.StringIO()
    assert predict_stream(trained[task], io.StringIO(json.dumps(row) + "\n"), answers, batch_size=2, device="cpu") == 0
    answer = json.loads(answers.getvalue())
    assert {"label", "answer", "tags"} & answer.keys()


def test_the_longest_sequence_has_the_last_position(tmp_path: Path) -> None:
    """34 positions are 32 tokens: padding has one, and one before it stands unused."""
    source = make_roberta(tmp_path, "ForSequenceClassification", num_labels=3)
    theirs = transformers.RobertaForSequenceClassification.from_pretrained(source).eval()
    settings = run_settings(tmp_path)
    config = encoder_config(settings, find_tokenizer(settings))
    assert (config.max_position_embeddings, config.longest_sequence) == (34, 32)
    model = BertForTask(replace(config, id2label=numbered_labels(3)), "sequence", 3)
    load_finetuned(model, source)
    tokens = np.random.default_rng(2).integers(5, config.vocab_size, size=32)
    feature = Feature(tokens, np.zeros(32, dtype=np.int8), np.array([0]))
    batch = collate_instances([Instance((feature,), np.array([0]), 0)], [0], HEADS["single"], most_features=1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)[None]).logits
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [True, False], ids=["with head", "bare"])
def test_the_head_of_a_pretrained_encoder_is_left_behind(tmp_path: Path, prefix: bool) -> None:
    source = make_roberta(tmp_path, "ForSequenceClassification" if prefix else "Model", num_labels=3)
    stored = {name.removeprefix("roberta."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    config = encoder_config(run_settings(tmp_path), find_tokenizer(run_settings(tmp_path)))
    model = BertForTask(replace(config, id2label=numbered_labels(3)), "sequence", 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    notes = load_encoder(model, source)
    for name, parameter in model.named_parameters():
        assert (parameter == 7.0).all() == name.startswith("classifier."), name
    assert torch.equal(model.embeddings.norm.weight, stored["embeddings.LayerNorm.weight"])  # type: ignore[union-attr]
    assert len(notes) == 4
    assert all(("is left behind" if prefix else "is not in") in note for note in notes)


def test_rows_of_the_head_follow_the_names_of_classes(tmp_path: Path) -> None:
    """Those of the last layer; the one before has none."""
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    source = make_roberta(tmp_path, "ForSequenceClassification", **names)
    config = encoder_config(run_settings(tmp_path), find_tokenizer(run_settings(tmp_path)))
    model = BertForTask(replace(config, id2label=dict(enumerate("cab"))), "sequence", 3)
    load_finetuned(model, source)
    stored = load_file(source / "model.safetensors")
    assert torch.equal(model.get_parameter("classifier.dense.weight"), stored["classifier.dense.weight"])
    for kind in ("weight", "bias"):
        expected = stored[f"classifier.out_proj.{kind}"][[2, 0, 1]]
        assert torch.equal(model.get_parameter(f"classifier.out_proj.{kind}"), expected)


# ---------------------------------------------------------------- bad inputs


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        values = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (source / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")

    return change


def _without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def _bare_sentencepiece(source: Path) -> None:
    _config(model_type="xlm-roberta")(source)
    (source / "tokenizer.json").rename(source / "sentencepiece.bpe.model")


def _cut_query(source: Path) -> None:
    stored = load_file(source / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    save_file(stored | {name: stored[name][:31].clone()}, source / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "changes", "expected"),
    [
        (None, {"task__max_length": 33}, r"task\.max_length is 33, but the model takes at most 32 tokens"),
        (_config(pad_token_id=0), {}, r"padding has the id 1, but that of the model in .* 0, from which it counts"),
        (_config(pruned_heads={"0": [1]}), {}, "attention heads were pruned"),
        (_config(num_hidden_layers=3), {}, "does not belong to an encoder of 3 layers"),
        (_config(num_hidden_layers=5), {}, r"tensors are missing, the first is encoder\.layers\.4\."),
        (_config(intermediate_size=32), {}, r"intermediate\.dense\.weight has shape \[64, 32\], but .*\[32, 32\]"),
        (_cut_query, {}, r"query\.weight has shape \[31, 32\], but .*\[32, 32\]: settings and weights are of two"),
        (_bare_sentencepiece, {}, r"whose ids fairseq has shifted: give its tokenizer\.json"),
        (_config(hidden_act="relu"), {}, "hidden_act is 'relu', but the integer function"),
        (_config(model_type="camembert"), {}, "has model_type 'camembert': expected megatron-bert"),
        (
            _config(model_type="bert"),
            {},
            r"is a bert: fine-tuning starts from megatron-bert, ibert, roberta, xlm-roberta",
        ),
        (_config(vocab_size=90), {}, r"says vocab_size 90, but there are \d+ rows of word embeddings"),
        (_without_weights, {}, r"holds config\.json, but no model\.safetensors"),
        (None, {"model__keep_head": True}, r"holds no classifier\.dense\.weight: it was not fine-tuned with this kind"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, damage: Any, changes: dict[str, Any], expected: str) -> None:
    shutil.copytree(folder / "encoder", tmp_path / "encoder")
    if damage is not None:
        damage(tmp_path / "encoder")
    settings = run_settings(folder, training__run_dir=tmp_path / "run", training__steps=1)
    model = {"from_": tmp_path / "encoder"} | {k[7:]: v for k, v in changes.items() if k.startswith("model__")}
    task = {k[6:]: v for k, v in changes.items() if k.startswith("task__")}
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update=model), "task": settings.task.model_copy(update=task)}
    )
    with pytest.raises(UserError, match=expected):
        finetune(settings)


def test_megatron_has_no_place_for_it(folder: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    for source in (folder / "encoder", trained["classification"]):
        with pytest.raises(UserError, match=r"is of a ibert model, which normalizes after each sum"):
            convert(source, tmp_path / "result", to="megatron")
