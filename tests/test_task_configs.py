# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/finetune and configs/quantize loads, has the numbers it claims, and trains at tiny size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_bert.config_file import load_sections
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.results import read_results
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.quantizing.settings import QuantizeSettings
from megatron_bert.tasks.table import GLUE_NAMES
from tests.megatron_bert.finetuning.roberta_support import make_roberta
from tests.megatron_bert.finetuning.support import (
    make_encoder,
    write_answers,
    write_classes,
    write_entities,
    write_questions,
)
from tests.megatron_bert.tasks.glue_samples import write_glue

ROOT = Path(__file__).resolve().parents[1]
FINETUNE = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
QUANTIZE = sorted((ROOT / "configs" / "quantize").glob("*.yaml"))

#: arXiv 1909.08053, table 6: batch, learning rate, epochs for 336M, 1.3B and 3.8B parameters.
PAPER = {
    "mnli": ((128, 1e-5, 10), (128, 1e-5, 10), (128, 1e-5, 10)),
    "qqp": ((128, 5e-5, 12), (128, 3e-5, 12), (256, 4e-5, 12)),
    "squad1": ((64, 3e-5, 2), (48, 3e-5, 2), (48, 1e-5, 2)),
    "squad2": ((48, 3e-5, 2), (64, 3e-5, 2), (48, 1e-5, 2)),
    "race": ((32, 2e-5, 3), (16, 1e-5, 3), (32, 2e-5, 3)),
}
SHRINK = [
    "task.max_length=24",
    "training.device=cpu",
    "training.steps=1",
    "training.seeds=null",
    "training.global_batch_size=2",
    "training.micro_batch_size=2",
    "precision.compute=float32",
    "logging.tensorboard=false",
]


def load(path: Path, *overrides: str) -> FinetuneSettings:
    return load_sections(path, list(overrides), QuantizeSettings if path in QUANTIZE else FinetuneSettings)


def test_there_is_a_file_for_every_glue_task() -> None:
    assert set(GLUE_NAMES) <= {path.stem for path in FINETUNE}


@pytest.mark.parametrize("path", [*FINETUNE, *QUANTIZE], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_loads(path: Path) -> None:
    settings = load(path)
    assert settings.training.run_dir.parent == Path("runs")
    assert settings.training.global_batch_size % settings.training.micro_batch_size == 0
    comment = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"configs/{path.parent.name}/{path.name}" in comment, "its own command is in its comment"


@pytest.mark.parametrize("name", PAPER)
def test_hyper_parameters_are_the_papers(name: str) -> None:
    path = ROOT / "configs" / "finetune" / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    for size, (batch, rate, epochs) in zip(("345M", "1.3B", "3.9B"), PAPER[name], strict=True):
        found = re.search(rf"^# {re.escape(size)}: with (.*)\.$", text, flags=re.MULTILINE)
        assert found or size == "345M" or f"# {size}: the same.\n" in text
        settings = load(path, *(found.group(1).split() if found else []))
        training = settings.training
        assert (training.global_batch_size, settings.learning_rate.peak, training.epochs) == (batch, rate, epochs), size
        assert training.seeds is not None
        assert len(training.seeds) == 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task_configs")
    make_encoder(folder, layers=2)
    write_glue(folder / "glue")
    (folder / "texts").mkdir()
    write_classes(folder / "texts" / "train.jsonl", 20, 1)
    write_questions(folder / "arc.jsonl", 4, 2)
    write_answers(folder / "squad.json", 4, 3)
    write_entities(folder / "ner.conll", 4, 4)
    passage = {"article": "w1 w2", "questions": ["w3 _ w4"], "options": [["w5", "w6", "w7", "w8"]], "answers": ["B"]}
    for split in ("train", "dev", "test"):
        for level in ("middle", "high"):
            (folder / "RACE" / split / level).mkdir(parents=True)
            (folder / "RACE" / split / level / "1.txt").write_text(json.dumps({"id": "1.txt", **passage}), "utf-8")
    endings = [f"ending{number}" for number in range(4)]
    row = "0,v,f,w1 w2,w1 w2,w3,gold,w4,w5,w6,w7,2\n"
    header = ["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source", *endings, "label"]
    (folder / "swag.csv").write_text(",".join(header) + "\n" + row, encoding="utf-8")
    return folder


def data_of(name: str, folder: Path) -> list[str]:
    """Overrides that name small files in place of those in the comments."""
    if name in GLUE_NAMES:
        return [f"data.directory={folder / 'glue'}"]
    if name == "race":
        return [f"data.directory={folder / 'RACE'}"]
    if name == "classification":
        return [f"data.train={folder / 'texts' / 'train.jsonl'}", "data.valid_fraction=0.2"]
    file = {"swag": "swag.csv", "arc": "arc.jsonl", "ner": "ner.conll"}.get(name, "squad.json")
    return [f"data.{split}={folder / file}" for split in ("train", "valid")] + ["data.test=null"]


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_trains_at_tiny_size(path: Path, place: Path, tmp_path: Path) -> None:
    start = [f"model.from={place / 'encoder'}", f"training.run_dir={tmp_path}"]
    window = ["task.doc_stride=4"] if path.stem.startswith("squad") else []
    finetune(load(path, *SHRINK, *start, *window, *data_of(path.stem, place)))
    results = read_results(tmp_path)
    assert results is not None
    assert results["metric"] in next(iter(results["splits"].values()))
    if path.stem == "classification":
        start = [f"model.from={tmp_path}", f"training.run_dir={tmp_path / 'int8'}"]
        quantize(
            load(ROOT / "configs" / "quantize" / "classification.yaml", *SHRINK, *start, *data_of(path.stem, place))
        )
        results = read_results(tmp_path / "int8")
        assert results is not None
        assert {"valid", "valid_float", "valid_calibrated"} == results["splits"].keys()


def test_a_roberta_is_fine_tuned_and_quantized(place: Path, tmp_path: Path) -> None:
    """By the commands in the comment of configs/quantize/roberta.yaml."""
    quantized = ROOT / "configs" / "quantize" / "roberta.yaml"
    settings = load(quantized)
    assert isinstance(settings, QuantizeSettings)
    # arXiv 2101.01321, section 4.2.
    assert (settings.learning_rate.peak, settings.training.epochs) == (1e-6, 12)
    assert settings.learning_rate.peak in settings.search.learning_rate
    source, run, data = make_roberta(tmp_path), tmp_path / "mrpc", [f"data.directory={place / 'glue'}"]
    start = [f"model.from={source}", f"training.run_dir={run}"]
    finetune(load(ROOT / "configs" / "finetune" / "mrpc.yaml", *SHRINK, *start, *data))
    start = [f"model.from={run}", f"training.run_dir={tmp_path / 'int8'}"]
    quantize(load(quantized, *SHRINK, *start, *data))
    results = read_results(tmp_path / "int8")
    assert results is not None
    assert {"valid", "valid_float", "valid_calibrated"} <= results["splits"].keys()
    assert json.loads((tmp_path / "int8" / "model" / "config.json").read_text(encoding="utf-8"))["quant_mode"] is True
