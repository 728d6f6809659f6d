# SPDX-License-Identifier: Apache-2.0
"""Every command and program of the guides runs, in their order, at tiny size; settings they name are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from pyarrow import ipc

from megatron_bert.config import Settings
from megatron_bert.finetuning.settings import FinetuneSettings
from tests.commands import run_command, run_python
from tests.pictures import WITHOUT_PICTURES
from tests.test_readme import SUBSTITUTIONS, TINY, make_place, run_line

GUIDES = Path(__file__).resolve().parents[1] / "docs" / "guides"
NAMES = sorted(path.stem for path in GUIDES.glob("*.md"))

#: What the guides' commands have beside those of the README.
MORE = [
    *SUBSTITUTIONS[:1],
    *(pair for pair in SUBSTITUTIONS if "pretrain" in pair[0] or "finetune" in pair[0]),
    (
        r"((?:finetune|quantize) (?:finetune|quantize)/\w+)",
        next(new for old, new in SUBSTITUTIONS if "quantize" in old),
    ),
    (r"--processes 8", "--processes 2"),
    (r"training\.steps=2000", "training.steps=3"),
    (r"training\.steps=10+ ", "training.steps=2 "),
    (r"training\.steps=10+$", "training.steps=2"),
]


def tiny(command: str) -> str:
    for pattern, replacement in MORE:
        command = re.sub(pattern, replacement, command)
    return re.sub(r"(submit bert_\S+) ", rf"\1 {' '.join(TINY[4:5])} ", command)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of all blocks of commands and programs."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guides take for granted: texts, tables, a corpus and one small model in several formats."""
    place = make_place(tmp_path_factory.mktemp("guides"), with_checkout=False)
    for command in (
        "train-tokenizer --input text/part0.jsonl text/part1.jsonl --vocab-size 120 --output vocabulary",
        "preprocess --input text/part0.jsonl --tokenizer vocabulary --output-prefix data/corpus --workers 1",
        f"pretrain bert_345m {' '.join(TINY)} tokenizer.path=vocabulary data.train=data/corpus_text_sentence "
        "training.run_dir=runs/first",
        "convert runs/first checkpoint --to huggingface --tokenizer vocabulary",
        "convert runs/first megatron_checkpoint --to megatron --tensor 2",
    ):
        done = run_command(*command.split(), folder=place)
        assert done.code == 0, done.text
    for name in ("own", "general"):
        shutil.copytree(place / "text", place / name)
    for suffix in (".bin", ".idx"):  # as NVIDIA's tool leaves them, without a note
        shutil.copy(place / f"data/corpus_text_sentence{suffix}", place / f"data/megatron_text_sentence{suffix}")
        shutil.copy(place / f"data/corpus_text_sentence{suffix}", place / f"data/large_text_sentence{suffix}")
    shutil.copy(place / "vocabulary" / "vocab.txt", place)
    texts = [json.loads(line)["text"] for line in (place / "text" / "part0.jsonl").read_text().splitlines()]
    (place / "saved_dataset").mkdir()
    table = pa.table({"text": texts})
    with ipc.new_stream(place / "saved_dataset" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    files = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (place / "saved_dataset" / "state.json").write_text(json.dumps(files))
    (place / "saved_dataset" / "dataset_info.json").write_text("{}")
    shutil.rmtree(place / "runs")
    return place


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_from_its_first_command_to_its_last(made: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "place"
    shutil.copytree(made, place)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": WITHOUT_PICTURES,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    found = blocks((GUIDES / f"{name}.md").read_text(encoding="utf-8"))
    assert found
    for language, content in found:
        if language == "python":
            run_program(content, place)
            continue
        for command in content.replace("\\\n", " ").splitlines():
            done = run_line(tiny(command), place, environment)
            assert done.code == 0, f"{command}\n{tiny(command)}\n{done.text}"


def run_program(program: str, place: Path) -> None:
    """Run a program in a process of its own, which has loaded what programs load."""
    (place / "program.py").write_text(program)
    done = run_python("program.py", folder=place)
    assert done.code == 0, f"{program}\n{done.text}"


def test_there_are_five() -> None:
    assert NAMES == ["cluster", "from_megatron", "from_transformers", "integer_classifier", "own_text"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_links(name: str) -> None:
    text = (GUIDES / f"{name}.md").read_text(encoding="utf-8")
    for section, field in re.findall(rf"`({'|'.join(Settings.model_fields)})\.(\w+)", text):
        fields = {}
        for kind in (Settings, FinetuneSettings):
            annotation: Any = kind.model_fields[section].annotation
            for one in get_args(annotation) or [annotation]:
                fields |= {info.alias or key: info for key, info in getattr(one, "model_fields", {}).items()}
        assert field in fields, f"{section}.{field} in {name}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (GUIDES / target).exists(), target


def test_the_notebook_runs(made: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(made, place)
    notebook = json.loads((GUIDES / "integer_classifier.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "it is kept without outputs"
    program = "\n".join("".join(cell["source"]) for cell in cells)
    assert "QUICK = False" in program
    run_program(program.replace("QUICK = False", "QUICK = True"), place)
