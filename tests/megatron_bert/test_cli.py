# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: one sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert import cli
from megatron_bert.cli import main
from megatron_bert.data.sidecar import write_sidecar
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import STATE_FILE
from parallel.manifest import write_manifest
from tests.megatron_bert.data.support import numbered_tokenizer, small_vocabulary
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    write_sidecar(folder / "corpus", load_tokenizer(folder / "vocab.txt"))
    return folder


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    """A settings file whose run would work."""
    return write_config(run_settings(data, tmp_path / "run"), tmp_path / "settings.yaml")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    pretrain(run_settings(data, run, training__steps=3))
    return run


class Refusal:
    """Runs commands that must fail."""

    def __init__(self, capsys: pytest.CaptureFixture[str], run: Path) -> None:
        self.capsys, self.run = capsys, run

    def __call__(self, *arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith(f"megatron-bert {arguments[0]}: ")
        assert "Traceback" not in err
        assert not self.run.exists()
        return err


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    return Refusal(capsys, tmp_path / "run")


class TestPretrain:
    def test_missing_settings(self, refusal: Refusal, tmp_path: Path) -> None:
        missing = tmp_path / "none.yaml"
        assert f"cannot read the settings file {missing}: No such file" in refusal("pretrain", missing)

    def test_broken_settings(self, refusal: Refusal, config: Path) -> None:
        config.write_text(config.read_text(encoding="utf-8") + "\n: [", encoding="utf-8")
        assert f"{config} is not valid YAML" in refusal("pretrain", config)

    def test_unknown_key(self, refusal: Refusal, config: Path) -> None:
        assert "did you mean seq_length?" in refusal("pretrain", config, "data.seq_lenght=12")

    def test_contradicting_settings(self, refusal: Refusal, config: Path) -> None:
        assert "data.seq_length 999 is above" in refusal("pretrain", config, "data.seq_length=999")

    def test_missing_corpus(self, refusal: Refusal, config: Path, tmp_path: Path) -> None:
        missing = tmp_path / "nothing"
        assert f"{missing}" in refusal("pretrain", config, f"data.train={missing}")
        assert f"{missing}" in refusal("pretrain", config, f"data.valid={missing}")

    @pytest.mark.parametrize("size", [0, 20, 60])
    def test_truncated_index(self, refusal: Refusal, config: Path, data: Path, tmp_path: Path, size: int) -> None:
        for ending in (".bin", ".idx"):
            shutil.copy(data / f"corpus{ending}", tmp_path / f"cut{ending}")
        index = tmp_path / "cut.idx"
        index.write_bytes(index.read_bytes()[:size])
        assert f"{index}" in refusal("pretrain", config, f"data.train={tmp_path / 'cut'}")

    def test_missing_tokenizer(self, refusal: Refusal, config: Path, tmp_path: Path) -> None:
        missing = tmp_path / "none.txt"
        assert f"{missing}" in refusal("pretrain", config, f"tokenizer.path={missing}")

    def test_another_tokenizer(self, refusal: Refusal, config: Path, tmp_path: Path) -> None:
        numbered_tokenizer(tmp_path, 91)
        text = refusal("pretrain", config, f"tokenizer.path={tmp_path / 'vocab.txt'}")
        assert "was made with a tokenizer of 90 entries" in text
        assert "the one given has 91" in text

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["parallel.tensor=2"], "does not divide the 3 processes started"),
            (["parallel.data=2"], "but 3 processes were started: start 2"),
            ([], "training.global_batch_size 8 is not a multiple of data-parallel size 3"),
        ],
    )
    def test_world_size(
        self,
        refusal: Refusal,
        config: Path,
        monkeypatch: pytest.MonkeyPatch,
        overrides: list[str],
        expected: str,
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert expected in refusal("pretrain", config, "parallel.data=null", *overrides)

    def test_resume_from_what_is_not_there(self, refusal: Refusal, config: Path, tmp_path: Path) -> None:
        for wrong in (tmp_path / "step_00000001", tmp_path):
            text = refusal("pretrain", config, f"checkpoint.resume={wrong}")
            assert f"checkpoint.resume is {wrong}, which is not a whole checkpoint: give auto, none or a step_" in text

    def test_resume_from_weights_alone(self, refusal: Refusal, config: Path, trained: Path, tmp_path: Path) -> None:
        bare = tmp_path / "step_00000003"
        shutil.copytree(trained / "checkpoints" / bare.name, bare)
        (bare / STATE_FILE).write_text(json.dumps({"step": 0, "consumed_samples": 0}), encoding="utf-8")
        write_manifest(bare)
        text = refusal("pretrain", config, f"checkpoint.resume={bare}")
        assert "holds no optimizer, loss_scale, tokenizer" in text
        assert "set model.from" in text

    def test_start_from_what_is_not_there(self, refusal: Refusal, config: Path, tmp_path: Path) -> None:
        missing = tmp_path / "none"
        assert f"{missing}" in refusal("pretrain", config, f"model.from={missing}")

    def test_start_from_another_size(self, refusal: Refusal, config: Path, trained: Path) -> None:
        text = refusal("pretrain", config, f"model.from={trained}", "model.hidden_size=32")
        assert f"model.hidden_size is 32, but the model in {trained} has 16: remove the setting" in text

    def test_start_with_another_vocabulary(
        self, refusal: Refusal, config: Path, data: Path, trained: Path, tmp_path: Path
    ) -> None:
        numbered_tokenizer(tmp_path, 91)
        for ending in (".bin", ".idx"):  # without its note, any tokenizer is taken
            shutil.copy(data / f"corpus{ending}", tmp_path / f"corpus{ending}")
        overrides = [f"model.from={trained}", f"tokenizer.path={tmp_path / 'vocab.txt'}"]
        overrides.append(f"data.train={tmp_path / 'corpus'}")
        assert main(["pretrain", str(config), *overrides]) == 2
        assert "the checkpoint has 90 words, but the tokenizer has 91" in refusal.capsys.readouterr().err
        assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_from_a_process(config: Path) -> None:
    """The module as a program: what a shell sees."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bert", "pretrain", str(config), "training.stepz=1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (f"megatron-bert pretrain: {config}: unknown setting training.stepz; did you mean steps?\n")


def test_other_ranks_hold_their_report_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr("megatron_bert.ending.time.sleep", waits.append)
    assert main(["pretrain", str(tmp_path / "none.yaml")]) == 2
    monkeypatch.setenv("RANK", "1")
    assert main(["pretrain", str(tmp_path / "none.yaml")]) == 2
    assert len(waits) == 1
    assert waits[0] > 0


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_bert.cli._config_schema", interrupt)
    assert main(["config-schema"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_programming_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ValueError("not a user's mistake")

    monkeypatch.setattr("megatron_bert.cli._config_schema", fail)
    with pytest.raises(ValueError, match="not a user's mistake"):
        main(["config-schema"])


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


class TestPreprocess:
    def arguments(self, folder: Path, text: str) -> list[str]:
        (folder / "in.jsonl").write_text(text, encoding="utf-8")
        tokenizer, prefix = small_vocabulary(folder), folder / "corpus"
        files = ["--input", str(folder / "in.jsonl"), "--tokenizer", str(tokenizer)]
        return ["preprocess", *files, "--output-prefix", str(prefix), "--workers", "1"]

    def test_report_is_a_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [{"text": "The cat sat. The dog ran."}, {"text": ""}, {"text": "A mat."}]
        arguments = self.arguments(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        expected = f"{tmp_path / 'corpus'}_text_sentence: 2 documents, 3 sentences, 11 tokens in "
        assert lines[-1].startswith(expected)
        assert lines[-1].endswith("; skipped 1 empty documents, 0 bad rows")
        assert not any("PreprocessReport" in line for line in lines)

    def test_missing_input(self, tmp_path: Path, refusal: Refusal) -> None:
        arguments = self.arguments(tmp_path, "")
        (tmp_path / "in.jsonl").unlink()
        assert "in.jsonl" in refusal(*arguments)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["vocab.txt"]


@pytest.mark.parametrize(
    "command",
    [
        *("convert '' result --to native", "convert model '' --to native", "inspect ''", "predict ''"),
        *("evaluate model --output ''", "fill-mask '' word", "pretrain ''", "merge '' --output joined"),
        *("merge part --output ''", "preprocess --input a --tokenizer '' --output-prefix b", "failures ''"),
        *("train-tokenizer --input a --vocab-size 9 --output ''", "convert a b --to native --verify ''"),
    ],
)
def test_an_empty_path_is_not_the_current_directory(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    assert ended.value.code == 2
    assert "the path is empty: give one, or . for the current directory" in capsys.readouterr().err


def test_nor_is_one_in_the_settings(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(config), "training.run_dir=''"]) == 2
    assert "training.run_dir is '': the path is empty: give one" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict {}", "evaluate {} data.test=x", "inspect {}", "fill-mask {} word"])
def test_a_model_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trainer").mkdir()
    for step in (5, 10, 20):
        (tmp_path / "trainer" / f"checkpoint-{step}").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name, says in (
        ("missing", f"{tmp_path}/missing is not there: check the path"),
        ("link", f"{tmp_path}/link is a symbolic link to nowhere, which is not there: check the path"),
        ("trainer", "holds no model itself, but checkpoint-5, checkpoint-10, checkpoint-20 of transformers' Trainer"),
    ):
        assert main([part.format(tmp_path / name) for part in command.split()]) == 2
        assert says in capsys.readouterr().err


def test_overrides_stand_behind_options_too(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(cli, "_train", lambda arguments: given.append(arguments.overrides))
    assert main(["pretrain", str(config), "a.b=1", "--dry-run", "c.d=2"]) == 0
    assert given == [["a.b=1", "c.d=2"]]
    for wrong in (["pretrain", str(config), "--dry-run", "c.d"], ["pretrain", str(config), "--none=1"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err
