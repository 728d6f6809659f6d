# SPDX-License-Identifier: Apache-2.0
"""Whole fine-tuning runs: learning, stopping, going on, what they leave behind."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.objective import Finetuning
from megatron_bert.finetuning.results import read_results
from megatron_bert.tasks.classification import ClassificationTask
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.signals import StopRequest
from megatron_bert.training.trainer import Trainer
from parallel.errors import UserError
from tests.megatron_bert.finetuning.support import make_run, run_settings, write_classes
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import assert_same_checkpoint, rows
from tests.megatron_bert.training.runs import run_settings as run_settings_of_pretraining

#: Two layers are enough to go on with, to stop and to save.
small_run = partial(make_run, layers=2)


class KilledError(Exception):
    """Stands for a killed process."""


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        if self.step == step:
            raise KilledError
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.usefixtures("pictures")
def test_learns_and_leaves_a_model_that_transformers_reads(tmp_path: Path) -> None:
    settings = make_run(
        tmp_path,
        training__epochs=8,
        training__micro_batch_size=16,
        learning_rate__peak=1e-3,
        model__hidden_dropout_prob=0.0,
        model__attention_probs_dropout_prob=0.0,
        data__test=tmp_path / "test.jsonl",
        logging__every=10,
    )
    write_classes(tmp_path / "test.jsonl", 30, 3)
    finetune(settings)
    results = read_results(tmp_path / "run")
    assert results is not None
    assert results["splits"]["valid"]["accuracy"] > 0.7, "a third is chance"
    assert results["splits"]["test"]["accuracy"] > 0.7
    assert [entry["examples"] for entry in results["data"]["train"]] == [120]
    assert {"curves.png", "confusion_valid.png", "confusion_test.png", "config.yaml"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }

    model_directory = tmp_path / "run" / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(model_directory).eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
    predicted = [json.loads(line) for line in (tmp_path / "run" / "predictions_valid.jsonl").open(encoding="utf-8")]
    rows_read = [json.loads(line) for line in (tmp_path / "valid.jsonl").open(encoding="utf-8")]
    with torch.no_grad():
        for row, prediction in zip(rows_read, predicted, strict=True):
            assert prediction["id"] == row["id"]
            logits = theirs(**tokenizer(row["text"], return_tensors="pt")).logits[0]
            expected = logits.softmax(dim=0)
            for number, name in theirs.config.id2label.items():
                assert prediction["probabilities"][name] == pytest.approx(float(expected[number]), abs=1e-5)


def test_the_best_checkpoint_is_kept_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are forced: the second evaluation is the best."""
    scores = iter([0.2, 0.9, 0.3, 0.4, 0.5])
    monkeypatch.setattr(Finetuning, "evaluate", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    settings = small_run(tmp_path, training__steps=10, training__evaluate_every=2, checkpoint__every=2)
    finetune(settings)
    results = read_results(tmp_path / "run")
    assert results is not None
    assert (results["best_step"], results["steps"]) == (4, 10)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000010",
    ]


def test_stops_early_and_stays_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter([0.5, 0.6, 0.4, 0.6])
    monkeypatch.setattr(Finetuning, "evaluate", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    settings = small_run(tmp_path, training__steps=20, training__evaluate_every=2, training__patience=2)
    finetune(settings)
    results = read_results(tmp_path / "run")
    assert results is not None
    assert (results["best_step"], results["steps"]) == (4, 8)
    assert "the run ends early" in capsys.readouterr().out
    finetune(settings)
    assert "nothing left to do" in capsys.readouterr().out


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"checkpoint__every": 3, "training__evaluate_every": 4, "checkpoint__keep": 0, "training__steps": 12}
    finetune(small_run(tmp_path, **changes))
    other = run_settings(tmp_path, training__run_dir=tmp_path / "killed", **changes)
    with monkeypatch.context() as patched:
        interrupt_after(7, patched)
        with pytest.raises(KilledError):
            finetune(other)
    finetune(other)
    assert rows(tmp_path / "killed") == rows(tmp_path / "run")
    last = Path("checkpoints") / "step_00000012"
    assert_same_checkpoint(tmp_path / "killed" / last, tmp_path / "run" / last)


@pytest.mark.usefixtures("pictures")
def test_seeds_are_reported_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_run(tmp_path, training__steps=3, training__seeds=[1, 2, 3])
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(KilledError):
            finetune(settings)
    finetune(settings)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    single = [read_results(tmp_path / "run" / f"seed_{seed}") for seed in (1, 2, 3)]
    losses = sorted(run["splits"]["valid"]["loss"] for run in single if run is not None)
    assert len(set(losses)) == 3
    summary = results["splits"]["valid"]["loss"]
    assert (summary["lowest"], summary["median"], summary["highest"]) == tuple(losses)
    assert (tmp_path / "run" / "runs.png").is_file()
    assert "of 3 runs" in capsys.readouterr().out
    accuracy = {name: scores["valid"]["accuracy"] for name, scores in results["runs"].items()}
    assert results["best"]["score"] == max(accuracy.values()) == accuracy[results["best"]["name"]]


def test_a_list_of_one_seed_is_summarized_too(tmp_path: Path) -> None:
    """What reads a directory of seeds finds its best run."""
    finetune(small_run(tmp_path, training__steps=1, training__seeds=[7]))
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["best"]["name"], list(results["runs"])) == ("seed_7", ["seed_7"])


def test_bad_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small_run(tmp_path, training__steps=1, data__on_bad_row="skip")
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "w1"\n')
    finetune(settings)
    assert "skipped 1 bad rows" in capsys.readouterr().out
    results = read_results(tmp_path / "run")
    assert results is not None
    assert results["data"]["train"][0]["skipped"] == 1


def test_a_run_that_could_not_save_its_model_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_run(tmp_path, training__steps=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr("megatron_bert.finetuning.finetune.save_task", full)
        with pytest.raises(UserError, match=r"cannot use model\.safetensors: No space left on device"):
            finetune(settings)
    assert read_results(tmp_path / "run") is None
    assert not list((tmp_path / "run").glob("model*"))
    finetune(settings)
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_stop_at_the_last_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one at a step that is to be evaluated: the run that goes on evaluates it first."""
    changes = {"training__steps": 5, "training__evaluate_every": 2, "checkpoint__keep": 0}
    finetune(small_run(tmp_path, **changes))
    settings = run_settings(tmp_path, training__run_dir=tmp_path / "stopped", **changes)
    for step in (2, 5):
        with monkeypatch.context() as patched:
            asked = iter(range(10))
            begun = step - 3 if step == 5 else 0
            patched.setattr(
                StopRequest, "agreed", lambda _, n=asked, at=step - begun: "SIGTERM" if next(n) + 1 == at else None
            )
            assert finetune(settings) == "SIGTERM"
    assert finetune(settings) is None
    found, expected = read_results(tmp_path / "stopped"), read_results(tmp_path / "run")
    assert found is not None
    assert expected is not None
    assert (found["best_step"], found["splits"]) == (expected["best_step"], expected["splits"])
    assert [row for row in rows(tmp_path / "stopped") if "valid_loss" in row] == [
        row for row in rows(tmp_path / "run") if "valid_loss" in row
    ]


def test_going_on_from_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    """The other run's best checkpoint does not count: it is elsewhere."""
    finetune(small_run(tmp_path, training__steps=2, training__evaluate_every=1))
    source = next((tmp_path / "run" / "checkpoints").iterdir())
    settings = run_settings(
        tmp_path, training__steps=3, training__run_dir=tmp_path / "other", checkpoint__resume=str(source)
    )
    finetune(settings)
    results = read_results(tmp_path / "other")
    assert results is not None
    assert results["best_step"] == 3
    with pytest.raises(UserError, match=r"holds the results of a run with training\.steps 3, but now it is 4"):
        finetune(settings.model_copy(update={"training": settings.training.model_copy(update={"steps": 4})}))
    several = run_settings(tmp_path, training__seeds=[1, 2], checkpoint__resume=str(source))
    with pytest.raises(UserError, match="there are 2 runs: give auto or none"):
        finetune(several)


class TestMistakes:
    """Each is one sentence, before anything is written."""

    def refusal(self, folder: Path, **changes: Any) -> str:
        settings = small_run(folder, **changes)
        with pytest.raises(UserError) as caught:
            finetune(settings)
        assert not (folder / "run" / "checkpoints").exists() or not list((folder / "run" / "checkpoints").iterdir())
        return str(caught.value)

    def test_too_long_for_the_model(self, tmp_path: Path) -> None:
        assert "task.max_length is 64, but the model takes at most 24" in self.refusal(tmp_path, task__max_length=64)

    def test_tensor_size(self, tmp_path: Path) -> None:
        assert "processes" in self.refusal(tmp_path, parallel__tensor=3)

    def test_no_training_data(self, tmp_path: Path) -> None:
        assert "data.train" in self.refusal(tmp_path, data__train=None, task__labels=["a", "b", "c"])

    def test_no_vocabulary(self, tmp_path: Path) -> None:
        settings = small_run(tmp_path)
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "encoder" / name).unlink()
        with pytest.raises(UserError, match=r"set tokenizer\.path"):
            finetune(settings)

    def test_warm_up_said_twice(self, tmp_path: Path) -> None:
        text = self.refusal(tmp_path, learning_rate__warmup_fraction=0.1, learning_rate__warmup_steps=4)
        assert "both say how long the warm-up is" in text

    @pytest.mark.parametrize("split", ["valid", "test"])
    def test_a_row_to_score_that_cannot_be_used(self, tmp_path: Path, split: str) -> None:
        """Found before anything is trained, though it is used after."""
        path = tmp_path / "late.jsonl"
        path.write_text(
            '{"id": 1, "text": "w1", "label": "a"}\n{"id": 2, "text": "w1", "label": "z"}\n', encoding="utf-8"
        )
        assert "late.jsonl line 2: " in self.refusal(tmp_path, **{f"data__{split}": path})
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("place", ["file", "file/run"])
    def test_a_run_directory_that_cannot_be_made(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("", encoding="utf-8")
        text = self.refusal(tmp_path, training__run_dir=tmp_path / place)
        assert f"training.run_dir {tmp_path / place} cannot be written to" in text

    def test_damaged_results(self, tmp_path: Path) -> None:
        finetune(small_run(tmp_path, training__steps=1))
        (tmp_path / "run" / "results.json").write_text('{"metric": ', encoding="utf-8")
        with pytest.raises(UserError, match=r"results\.json is damaged .*: remove it to train on"):
            finetune(run_settings(tmp_path, training__steps=1))

    def test_patience_without_evaluations(self, tmp_path: Path) -> None:
        text = self.refusal(tmp_path, training__patience=2, training__evaluate_every=0)
        assert "training.patience is 2 evaluations, but with training.evaluate_every 0 there is none" in text
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("seeds", [None, [1, 2]])
    def test_a_warm_up_as_long_as_the_run(self, tmp_path: Path, seeds: list[int] | None) -> None:
        changes = {"training__seeds": seeds, "learning_rate__warmup_steps": 4, "learning_rate__schedule": "linear"}
        assert "warmup_steps 4 leaves no step" in self.refusal(tmp_path, training__steps=4, **changes)
        assert not (tmp_path / "run").exists()

    def test_a_checkpoint_to_resume_that_is_not_there(self, tmp_path: Path) -> None:
        assert "step_00000009" in self.refusal(tmp_path, checkpoint__resume=str(tmp_path / "step_00000009"))
        assert not (tmp_path / "run").exists()

    def test_resume_with_another_task(self, tmp_path: Path) -> None:
        finetune(small_run(tmp_path, training__steps=2))
        (tmp_path / "run" / "results.json").unlink()
        with pytest.raises(UserError, match="task settings or labels"):
            finetune(run_settings(tmp_path, training__steps=2, task__max_length=12))


def test_goes_on_from_a_fine_tuned_model_with_its_head(tmp_path: Path) -> None:
    finetune(small_run(tmp_path, training__steps=4))
    before = read_results(tmp_path / "run")
    for source in ("run", "run/model"):
        model = {"from": tmp_path / source, "keep_head": True}
        again = run_settings(
            tmp_path,
            training__steps=1,
            training__run_dir=tmp_path / f"again_{source.replace('/', '_')}",
            learning_rate__peak=1e-12,
        ).model_dump(by_alias=True) | {"model": model}
        settings = type(run_settings(tmp_path)).model_validate(again)
        finetune(settings)
        after = read_results(settings.training.run_dir)
        assert before is not None
        assert after is not None
        assert after["splits"]["valid"] == pytest.approx(before["splits"]["valid"], rel=1e-4)


def test_starts_from_a_pretraining_run_with_its_tokenizer(tmp_path: Path) -> None:
    """And from one of its checkpoints; the vocabulary it was trained with may be gone."""
    make_data(tmp_path)
    pretrain(run_settings_of_pretraining(tmp_path, tmp_path / "pretrained", training__steps=3))
    (tmp_path / "vocab.txt").unlink()
    write_classes(tmp_path / "train.jsonl", 20, 1)
    write_classes(tmp_path / "valid.jsonl", 10, 2)
    for number, source in enumerate(("pretrained", "pretrained/checkpoints/step_00000003")):
        settings = run_settings(
            tmp_path,
            model={"from": tmp_path / source},
            task__max_length=12,
            training__steps=1,
            training__run_dir=tmp_path / f"run{number}",
        )
        finetune(settings)
        results = read_results(tmp_path / f"run{number}")
        assert results is not None
        assert results["splits"]["valid"]["loss"] > 0


def test_keeping_a_head_that_is_none(tmp_path: Path) -> None:
    small_run(tmp_path)
    with pytest.raises(UserError, match="was not fine-tuned with this kind of head"):
        finetune(run_settings(tmp_path, model__keep_head=True))


class TestSettingsThatDoNotFitTheRun:
    def test_results_of_other_settings(self, tmp_path: Path) -> None:
        finetune(small_run(tmp_path, training__steps=1))
        with pytest.raises(UserError, match=r"learning_rate\.peak 0\.003, but now it is 0\.001"):
            finetune(run_settings(tmp_path, training__steps=1, learning_rate__peak=1e-3))
        finetune(run_settings(tmp_path, training__steps=1, logging__every=7))  # which changes no result
        (tmp_path / "run" / "results.json").unlink()
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        with pytest.raises(UserError, match=r"run/model is of an earlier run, .*: remove it"):
            finetune(run_settings(tmp_path, training__steps=1, learning_rate__peak=1e-3))

    @pytest.mark.parametrize("name", ["train", "valid"])
    def test_results_of_other_data(self, tmp_path: Path, name: str) -> None:
        finetune(small_run(tmp_path, training__steps=1))
        write_classes(tmp_path / f"{name}.jsonl", 20, 9)
        with pytest.raises(UserError, match=rf"results of a run with another content of .*{name}\.jsonl"):
            finetune(run_settings(tmp_path, training__steps=1))

    @pytest.mark.parametrize("name", ["patience", "evaluate_every"])
    def test_nothing_to_evaluate_on(self, tmp_path: Path, name: str) -> None:
        settings = small_run(tmp_path, data__valid=None, **{f"training__{name}": 2})
        with pytest.raises(UserError, match=f"training.{name} is 2, but there is nothing to evaluate on"):
            finetune(settings)

    def test_without_validation_data_the_last_step_is_kept(self, tmp_path: Path) -> None:
        finetune(small_run(tmp_path, data__valid=None, training__steps=2))
        results = read_results(tmp_path / "run")
        assert results is not None
        assert (results["best_step"], results["splits"]) == (2, {})

    def test_a_metric_that_the_data_do_not_yield(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = small_run(tmp_path, training__steps=1)
        monkeypatch.setattr(ClassificationTask, "metrics", lambda *_: {"f1_macro": 1.0})
        with pytest.raises(UserError, match=r"task\.metric is accuracy, which the validation data do not yield"):
            finetune(settings)

    def test_training_data_that_changed(self, tmp_path: Path) -> None:
        finetune(small_run(tmp_path, training__steps=1))
        (tmp_path / "run" / "results.json").unlink()
        write_classes(tmp_path / "train.jsonl", 120, 9)
        with pytest.raises(UserError, match="was trained with other training data"):
            finetune(run_settings(tmp_path, training__steps=1))

    @pytest.mark.usefixtures("pictures")
    def test_names_with_dollar_signs_are_drawn(self, tmp_path: Path) -> None:
        settings = small_run(tmp_path, training__steps=1)
        for name in ("train", "valid"):
            path = tmp_path / f"{name}.jsonl"
            path.write_text(path.read_text(encoding="utf-8").replace('"label": "a"', '"label": "$a_$"'), "utf-8")
        finetune(settings)
        assert (tmp_path / "run" / "confusion_valid.png").is_file()
