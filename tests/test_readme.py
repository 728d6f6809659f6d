# SPDX-License-Identifier: Apache-2.0
"""Every command of the README runs, at tiny size: what is written there works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from megatron_bert.config_file import load_settings
from tests.commands import Ended, run_command, run_python, run_ranks
from tests.pictures import WITHOUT_PICTURES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: Commands that set up an environment or run everything: their scripts must exist, and tests of their own run them.
SCRIPTS = ("bash launch/quickstart.sh", "bash launch/test.sh", "source .venv/bin/activate", "pip install .")

#: Sizes that make a run of any settings file a matter of seconds, put before the README's own overrides.
TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.seq_length=32",
    "data.split=80,20,0",
    "data.workers=0",
    "training.device=cpu",
    "training.compile=false",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.evaluate_batches=1",
    "training.steps=2",
    "logging.every=1",
]

#: The same for runs on labeled data.
TINY_TASK = [
    "task.max_length=32",
    "training.device=cpu",
    "training.steps=2",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "precision.compute=float32",
    "logging.every=1",
]

#: What is replaced in a command, in this order; everything else runs as it stands.
SUBSTITUTIONS = [
    (r"--vocab-size 30522", "--vocab-size 120"),
    (r"--nproc-per-node 8", "--nproc-per-node 2"),
    (r"--processes 8", "--processes 2"),
    (r"--hosts 4 --head node1 --interface ib0", "--processes 2"),
    (r"(pretrain (?:configs/\w+(?:\.\w+)?\.yaml|bert_\w+))", r"\1 " + " ".join(TINY)),
    (r"((?:finetune|quantize) configs/\w+/\w+\.yaml)", r"\1 " + " ".join(TINY_TASK)),
    (r"(checkpoint\.resume=\S+)/step_00100000", r"\1/step_00000002 training.steps=3"),
    (r"(benchmarks\.throughput) --pairs 1", r"\1 --pairs 1 --warmup 1 --layers 1 --hidden 64 --length 32 --batch 2"),
    (r"^tensorboard ", "tensorboard --inspect "),  # prints what it finds instead of serving it
]


def commands() -> list[str]:
    """The lines of all bash blocks, continued lines joined."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL):
        found += [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return found


def tiny(command: str) -> str:
    """A command with the substitutions made."""
    for pattern, replacement in SUBSTITUTIONS:
        command = re.sub(pattern, replacement, command)
    return command


def own_text_commands() -> list[str]:
    """The first commands after the installation: from text to a model, without a checkout."""
    found = commands()
    begin = found.index("pip install .") + 1
    return found[begin : begin + 3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README takes for granted: text, a second corpus, and the settings files and tools."""
    return make_place(tmp_path_factory.mktemp("readme"))


def make_place(folder: Path, *, with_checkout: bool = True) -> Path:
    """The same in a given folder; without a checkout text and tables alone."""
    if with_checkout:
        shutil.copytree(ROOT / "configs", folder / "configs")
        for name in ("tools", "launch", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
    (folder / "text").mkdir(parents=True)
    line = "quick brown foxes jump over the very lazy dogs while a zebra was in some other house of this big world"
    words = line.split()
    for part in range(2):
        with (folder / "text" / f"part{part}.jsonl").open("w", encoding="utf-8") as file:
            for document in range(30):
                sentences = [
                    " ".join(words[(part + document + s * w) % len(words)] for w in range(1, 12)).capitalize() + "."
                    for s in range(10)
                ]
                file.write(f'{{"text": "{" ".join(sentences)}"}}\n')
    (folder / "data" / "texts").mkdir(parents=True)
    for name, rows in (("train", 60), ("test", 20), ("new", 20)):
        texts = [f'{{"text": "{words[n % 20]} {words[n % 7]}", "label": "{"ab"[n % 2]}"}}' for n in range(rows)]
        (folder / "data" / "texts" / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def test_readme_has_commands() -> None:
    found = commands()
    assert len(found) > 10
    for pattern, _ in SUBSTITUTIONS:
        assert any(re.search(pattern, command) for command in found), f"{pattern} is replaced nowhere"


def run_line(command: str, folder: Path, environment: dict[str, str]) -> Ended:
    """Run a line of bash; programs in Python alone on it, also by torchrun, in processes that have loaded torch."""
    bash = ["bash", "-euo", "pipefail", "-c"]
    if "torchrun.sh" in command:
        # Started by this script in its own tests: here, what it would start.
        (folder / "agent").write_text('#!/bin/sh\nprintf \'%s\\0\' "$MEGATRON_BERT_LOG_DIR" "$@" >agent_started\n')
        (folder / "agent").chmod(0o755)
        own = environment | {"PYTHON": str(folder / "agent")}
        subprocess.run([*bash, command], cwd=folder, env=own, check=True, timeout=60)
        logs, _, agent, *words = (folder / "agent_started").read_text(encoding="utf-8").split("\0")[:-1]
        assert agent == "megatron_bert.launching.agent"
        return _launched(words, folder, MEGATRON_BERT_LOG_DIR=logs)
    line, _, file = command.partition(" > ")
    program, _, rest = line.partition(" ")
    if program in ("megatron-bert", "python") or (program == "torchrun" and " -m megatron_bert " in rest):
        split = subprocess.run([*bash, f"printf '%s\\0' {rest}"], cwd=folder, capture_output=True, check=True)
        words = split.stdout.decode().split("\0")[:-1]
        if program == "megatron-bert":
            return run_command(*words, folder=folder, stdout=folder / file if file else None)
        assert not file, command
        if program == "python":
            return run_python(*words, folder=folder)
        return _launched(words, folder)
    done = subprocess.run([*bash, command], cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    return Ended(done.returncode, done.stdout + done.stderr)


def _launched(words: list[str], folder: Path, **variables: str) -> Ended:
    """The ranks that a launcher starts which is given these arguments."""
    given = torchrun.parse_args(words)
    assert given.standalone
    assert given.module
    assert given.training_script == "megatron_bert"
    ended = run_ranks(int(given.nproc_per_node), *given.training_script_args, folder=folder, **variables)
    return Ended(max(abs(rank.code) for rank in ended), "".join(rank.text for rank in ended))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_runs(place: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": WITHOUT_PICTURES,
        "OMP_NUM_THREADS": "1",
    }
    for command in commands():
        script = next((script for script in SCRIPTS if command.startswith(script)), None)
        if script is not None:
            if "bash launch/" in script:
                assert (ROOT / script.split()[-1]).is_file()
            continue
        done = run_line(tiny(command), place, environment)
        assert done.code == 0, f"{command}\n{tiny(command)}\n{done.text}"
        if "--output-prefix data/corpus" in command:
            for suffix in (".bin", ".idx", ".json"):  # the corpus that is blended with the first
                shutil.copy(place / f"data/corpus_text_sentence{suffix}", place / f"data/notes_text_sentence{suffix}")
    # A few things the README says are there afterwards.
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "curves.png", "checkpoints", "cache"):
        assert (place / "runs" / "one" / name).exists()
    for run in ("texts", "float", "int8"):
        assert (place / "runs" / run / "results.json").exists()
    assert (place / "runs" / "int8" / "model" / "quantization.json").exists()
    answers = [(place / name).read_text(encoding="utf-8").splitlines() for name in ("answers.jsonl", "integers.jsonl")]
    assert [len(lines) for lines in answers] == [20, 20]
    assert (place / "configs" / "schema.json").stat().st_size > 1000


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_table_of_sizes(path: Path) -> None:
    model = load_settings(path, []).model
    row = f"(configs/{path.name}) | {model.num_hidden_layers} | {model.hidden_size} | {model.num_attention_heads} |"
    assert row in README
