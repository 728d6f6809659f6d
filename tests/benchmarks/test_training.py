# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training times the real trainer's step and transformers' in turn."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.throughput import make_batch, their_inputs
from benchmarks.training import SIZES, Size, main
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.process_group import World


@pytest.fixture
def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary: of the tiny size, a real one takes most of the time."""
    monkeypatch.setattr(training, "VOCABULARY", 500)


@pytest.mark.usefixtures("_few_words")
def test_results(tmp_path: Path) -> None:
    kinds = ["ours", "transformers", "transformers' Trainer"]
    options = [part for kind in kinds for part in ("--kind", kind)]
    output = tmp_path / "results.json"
    assert main(["--size", "tiny", *options, "--warmup", "1", "--steps", "2", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    (found,) = report["sizes"]
    assert found["failures"] == {}
    assert found["together"]
    tokens = 4 * 2 * 64
    for kind in kinds:
        times = found["kinds"][kind]["step_seconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert found["kinds"][kind]["tokens_per_second"] == tokens / times["median"]
    assert "times_as_long_as_ours" not in found["kinds"]["ours"]
    assert found["kinds"]["transformers"]["times_as_long_as_ours"]["median"] > 0


@pytest.mark.usefixtures("_few_words")
def test_a_kind_that_fails_or_comes_too_late_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ArithmeticError("no such kernel\nand more")

    monkeypatch.setattr(training, "their_step", broken)
    monkeypatch.setattr(training, "_fit_together", lambda *_: False)
    output = tmp_path / "results.json"
    kinds = ["--kind", "ours", "--kind", "transformers", "--size", "tiny", "--attention-dropout", "0"]
    given = [*kinds, "--attention-dropout", "0.1", "--warmup", "1", "--steps", "5", "--seconds", "0"]
    assert main([*given, "--output", str(output)]) == 0
    for case in json.loads(output.read_text())["sizes"]:
        assert case["failures"] == dict.fromkeys(["ours", "transformers"], "no time was left")
    given[given.index("--seconds") + 1] = "100"
    assert main([*given, "--output", str(output)]) == 0
    for case in json.loads(output.read_text())["sizes"]:
        assert case["failures"] == {"transformers": "no such kernel"}
        assert case["kinds"]["ours"]["step_seconds"]["min"] > 0


def test_the_three_sizes_are_those_of_the_configurations() -> None:
    shapes = {name: (size.layers, size.hidden, size.heads) for name, size in SIZES.items()}
    assert shapes["345m"] == (24, 1024, 16)
    assert shapes["1.3b"] == (24, 2048, 32)
    assert shapes["3.9b"] == (48, 2560, 40)


def test_models_too_large_to_be_held_together_take_turns() -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    options = training.argparse.Namespace(device="cpu", dtype="float32", dropout=0.1, attention_dropout=0.1)
    assert training._fit_together(SIZES["tiny"], options, 5, world)
    assert not training._fit_together(Size(200, 8192, 64, 512, 1, 1), options, 5, world)


def test_both_train_on_the_same_words() -> None:
    batch = make_batch(MegatronBertConfig(vocab_size=100), 3, 16)
    given = their_inputs(batch, torch.device("cpu"))
    assert given["input_ids"].shape == (3, 16)
    masked = given["labels"].flatten() >= 0
    assert masked.nonzero().flatten().tolist() == sorted(batch.slots.tolist())
    assert torch.equal(given["labels"].flatten()[batch.slots], batch.slot_labels)


def _commands_on_a_gpu() -> list[list[str]]:
    ledger = Path(training.__file__).with_name("README.md").read_text(encoding="utf-8")
    section = ledger.split("## On a GPU")[1].split("\n## ")[0]
    lines = section.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ")]


def test_the_script_for_a_gpu_takes_eight_minutes_and_what_is_there() -> None:
    commands = _commands_on_a_gpu()
    assert sum(int(command[1]) for command in commands) <= 8 * 60
    gpu_tests, *benchmarks = ([*command[2:]] for command in commands)
    root = Path(training.__file__).parents[1]
    marked = {
        str(path.relative_to(root))
        for path in (root / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu\b", path.read_text(encoding="utf-8"))
    }
    assert {part for part in gpu_tests if part.startswith("tests/")} == marked - {"tests/benchmarks/test_training.py"}
    for command, limit in zip(benchmarks, (int(command[1]) for command in commands[1:]), strict=True):
        assert command[:3] == ["python", "-m", "benchmarks.training"]
        options = training.options_of(command[3:])
        assert options.device == "cuda"
        assert options.seconds + 30 <= limit, "there is time to import and to end"
        for name in options.size:
            for kind in options.kind:
                if kind in training.OURS:
                    settings = training.settings_of(SIZES[name], with_dropout(options), Path("unused"), kind)
                    assert settings.training.cuda_graphs == (kind == "ours, CUDA graphs")


@pytest.mark.parametrize("number", [1, 2])
def test_the_script_for_a_gpu_is_rehearsed_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """With ``--small``, as the ledger says; without the compiler, which takes long."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    given = [*_commands_on_a_gpu()[number][5:], "--small", "--warmup", "1", "--steps", "1"]
    output = Path(given[given.index("--output") + 1])
    wanted, plain = training.options_of(given), training.options_of(given[: given.index("--small")])
    assert main(given) == 0
    report = json.loads(output.read_text())
    assert report["dtype"] == wanted.dtype == "bfloat16"
    assert len(report["sizes"]) == len(plain.size) * len(plain.attention_dropout)
    for case in report["sizes"]:
        assert case["failures"] == {"ours, CUDA graphs": "graphs need a GPU"}
        assert case["size"] == "tiny"
        assert [*case["kinds"]][1:] == [kind for kind in plain.kind if kind not in case["failures"]]


def with_dropout(options: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(options) | {"attention_dropout": options.attention_dropout[0]})
