# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning and a quantization checked before they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_bert import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.cli import main
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.model.sequences import filling
from megatron_bert.planning.communication import step_messages, totals
from megatron_bert.planning.dry_run import dry_run_rank
from megatron_bert.planning.dry_run_command import checked_run, measure
from megatron_bert.planning.layouts import stages_of
from megatron_bert.planning.memory import layout_of, rank_memory
from megatron_bert.planning.work import rank_flops
from tests.megatron_bert.data.support import small_vocabulary
from tests.megatron_bert.finetuning.support import (
    CONFIG,
    WORDS,
    make_encoder,
    make_run,
    run_settings,
    write_answers,
    write_classes,
    write_entities,
    write_questions,
)
from tests.megatron_bert.quantizing.support import quantize_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder."""
    made = tmp_path_factory.mktemp("tasks")
    make_encoder(made)
    return made


def config_file(folder: Path, name: str, write: Callable[..., Path], **changes: Any) -> Path:
    """Settings of a task over data of its own."""
    ending = {"token_classification": "txt", "question_answering": "json", "long": "tsv"}.get(name, "jsonl")
    data = {part: write(folder / f"{name}_{part}.{ending}", rows, rows) for part, rows in (("train", 24), ("valid", 8))}
    task = {"name": "classification" if name == "long" else name, "max_length": 24}
    settings = run_settings(folder, **{"task": task, "data": data, "training__device": "cuda", **changes})
    path = folder / f"{name}.yaml"
    path.write_text(settings.dump(), encoding="utf-8")
    return path


#: Task, what writes its data, a rank, ranks, and settings.
PIPELINE = ["parallel.pipeline=2"]
CASES: list[tuple[str, Callable[..., Path], int, int, list[str]]] = [
    ("classification", write_classes, 0, 1, ["training.compile=true"]),
    (
        "classification",
        write_classes,
        0,
        1,
        [
            "training.compile=true",
            "training.micro_batch_size=7",
            "training.global_batch_size=7",
            "precision.compute=bfloat16",
        ],
    ),
    ("classification", write_classes, 1, 2, ["parallel.sharding=full"]),
    ("classification", write_classes, 0, 2, ["precision.compute=float16", "optimizer.name=lamb"]),
    ("multiple_choice", write_questions, 3, 4, ["parallel.tensor=2", "parallel.sequence=true"]),
    (
        "token_classification",
        write_entities,
        5,
        8,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"],
    ),
    ("question_answering", write_answers, 1, 2, ["training.recompute=full", *PIPELINE]),
]


@pytest.mark.parametrize(("name", "write", "rank", "ranks", "overrides"), CASES)
def test_operations_and_messages_are_those_of_a_real_step(
    name: str, write: Callable[..., Path], rank: int, ranks: int, overrides: list[str], folder: Path
) -> None:
    with checked_run("finetune", config_file(folder, name, write), overrides, ranks) as run:
        step = dry_run_rank(run.settings, run.make_objective, run.batch, rank, ranks)
    layout = layout_of(run.settings, ranks)
    stages = stages_of(run.workload, layout)
    place, in_stage = divmod(rank, ranks // layout.pipeline)
    assert rank_flops(run.workload, layout, stages, place) == step.flops
    expected = totals(step_messages(run.workload, layout, stages, place, in_stage // layout.tensor))
    assert expected == {tuple(what): (seen.count, seen.bytes) for what, seen in step.traffic.items()}


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_the_longest_micro_batch_has_a_shape_of_training(compiled: str, folder: Path) -> None:
    """Of compiled code, which sees few, with filling and sequences of no tokens."""
    path = config_file(folder, "classification", write_classes)
    given = [f"training.compile={compiled}", "training.micro_batch_size=6", "training.global_batch_size=6"]
    with checked_run("finetune", path, given, 1) as run:
        objective = run.make_objective(run.settings)
        mesh = SimpleNamespace(layout=run.layout, data_rank=0)
        trained = next(objective.training_batches(cast(Any, mesh), 0, 1, torch.device("cpu")))
        longest = run.batch
    assert longest.layout.boundaries is not None
    assert trained.layout.boundaries is not None
    if compiled == "true":
        assert longest.layout.boundaries.shape == trained.layout.boundaries.shape
        assert (longest.layout.batch, longest.layout.length) == (trained.layout.batch, trained.layout.length)
        assert longest.layout.fill == filling(6 * longest.layout.length, few=True)
    assert longest.tokens.shape[0] >= trained.tokens.shape[0]


def test_memory_is_that_of_a_real_step(tmp_path: Path) -> None:
    values = CONFIG.to_dict() | {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 128}
    config = MegatronBertConfig.from_dict(values)
    MegatronBertForPreTraining(config).save_pretrained(tmp_path / "encoder")
    save_tokenizer(load_tokenizer(small_vocabulary(tmp_path, WORDS)), tmp_path / "encoder", 128)

    def write_long(path: Path, rows: int, _seed: int) -> Path:
        rows_of_text = "".join(f"{'w1 ' * 200}\t{row % 2}\n" for row in range(rows))
        path.write_text(f"text\tlabel\n{rows_of_text}", encoding="utf-8")
        return path

    task = {"name": "classification", "max_length": 128}
    with checked_run("finetune", config_file(tmp_path, "long", write_long, task=task), [], 2) as run:
        step = dry_run_rank(run.settings, run.make_objective, run.batch, 1, 2)
    layout = layout_of(run.settings, 2)
    memory = rank_memory(run.workload, layout, stages_of(run.workload, layout))
    assert memory.peak == pytest.approx(step.peak_bytes, rel=0.03)


def test_the_command_says_what_it_checked_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = config_file(folder, "classification", write_classes)
    given = [str(path), f"training.run_dir={tmp_path / 'run'}", "training.seeds=[1,2]", "--dry-run", "--gpus", "2"]
    assert main(["finetune", *given, "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    for words in ("labels: a, b, c", "24 training sequences", "in each of 2 runs", "rank 0 of 2", "by closed form"):
        assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["model.from=nowhere"], "model.from is nowhere"),
        (["model.keep_head=true"], "holds no"),
        (["task.labels=[a,b]"], "label"),
        (["task.max_length=25"], "task.max_length is 25"),
        (["parallel.tensor=3"], "does not divide"),
    ],
)
def test_what_a_dry_run_refuses(given: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(folder, "classification", write_classes)
    assert main(["finetune", str(path), *given, "--dry-run", "--gpus", "3" if "tensor" in given[0] else "1"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_quantization_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(make_run(tmp_path, layers=2, training__steps=1))
    settings = quantize_settings(tmp_path, training__run_dir=tmp_path / "integers", training__device="cuda")
    path = tmp_path / "quantize.yaml"
    path.write_text(settings.dump(), encoding="utf-8")
    assert main(["quantize", str(path), "--dry-run", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "rank 0 of 2" in said
    assert "by closed form" not in said
    assert not (tmp_path / "integers").exists()


def test_what_is_to_be_queued_is_checked_as_far_as_it_is_here(folder: Path) -> None:
    path = config_file(folder, "classification", write_classes)
    run_dir = f"training.run_dir={folder / 'queued'}"
    found = "\n".join(measure("finetune", path, [run_dir], 2))
    assert "dry run: rank 0 of 2 takes" in found
    assert "labels: a, b, c" in found
    (absent,) = measure("finetune", path, [run_dir, "data.valid=elsewhere.jsonl"], 2)
    assert "elsewhere.jsonl is not here" in absent
