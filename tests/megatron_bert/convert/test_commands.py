# SPDX-License-Identifier: Apache-2.0
"""The command line, the script beside the archive, and every command of the documentation."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_bert.convert import commands
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.options import DTYPE_NAMES
from megatron_bert.convert.state import DTYPES
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, draw, write_checkpoint, write_zip
from tests.megatron_bert.convert.support import all_tensors, assert_same_tensors

ROOT = Path(__file__).parents[3]
#: Heads of 64, as the converter takes them for an archive without arguments.
SIZES = Sizes(layers=2, hidden=256, heads=4, ffn=32, words=100)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands.add_convert_commands(parser.add_subparsers(dest="command"))
    return parser.parse_args(arguments)


def _run(arguments: list[str]) -> None:
    parsed = _parse(arguments)
    parsed.func(parsed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the documentation starts from, at a tiny size: an archive and its vocabulary."""
    source = write_checkpoint(
        tmp_path / "ngc", draw(SIZES, dtype=torch.float16), SIZES, era="transformer", version=None, args=None
    )
    write_zip(tmp_path / "megatron_bert_345m.zip", source)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,"]
    pieces += [f"##{piece}" for piece in pieces[5:]] + [f"word{i}" for i in range(100)]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces[: SIZES.words]) + "\n")
    return tmp_path


def test_every_command_of_the_documentation_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    text = (ROOT / "docs/conversion.md").read_text().replace("30522", str(SIZES.words))
    lines = re.findall(r"^    ((?:megatron-bert|python tools).*)$", text, re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line)
        if words[0] == "python":
            assert _script().main(words[2:]) == 0
        else:
            _run(words[1:])
    output = capsys.readouterr().out
    assert "query, key and value rows [3, heads, head_dim]" in output
    assert "masked-language loss" in output
    first = all_tensors(Path("megatron_bert_345m.zip"), true_vocab_size=SIZES.words)
    assert_same_tensors(all_tensors(Path("bert_345m_old.zip")), first)
    assert_same_tensors(all_tensors(folder), first)  # config.json and model.safetensors beside the archive


def test_the_python_of_the_documentation_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/conversion.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert names["report"].missing == names["report"].unexpected == ()
    assert torch.equal(names["model"].encoder.layers["0"].attention.query_key_value.weight, names["weight"].float())


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools/convert_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_works_inside_the_folder_and_keeps_what_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), "megatron_bert_345m.zip"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "megatron_bert_345m.zip"} <= {p.name for p in folder.iterdir()}
    monkeypatch.chdir(folder)
    assert _script().main(["megatron_bert_345m.zip"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_script_in_a_folder_that_cannot_be_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert _script().main(["megatron_bert_345m.zip"]) == 2
    assert "cannot be written (Read-only file system" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        assert _script().main(["megatron_bert_345m.zip"]) == 2
    assert "cannot be written to: choose another destination" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_the_script_replaces_the_files_that_it_wrote_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name in ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"):
        (folder / name).write_text("{}")
    assert _script().main(["megatron_bert_345m.zip", "--true-vocab-size", "100"]) == 2
    assert "pytorch_model-00001-of-00002.bin is there already" in capsys.readouterr().err
    for vocabulary in ("vocab.txt", str(folder / "vocab.txt")):
        arguments = ["megatron_bert_345m.zip", "--overwrite", "--tokenizer", vocabulary]
        assert _script().main(arguments) == 0
    names = {path.name for path in folder.iterdir()} - {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"ngc", "megatron_bert_345m.zip", "vocab.txt", "config.json", "model.safetensors"}


def test_a_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in folder.iterdir())
    source = str(folder / "megatron_bert_345m.zip")
    _run(["convert", source, str(folder / "out"), "--to", "megatron", "--tensor", "2", "--dry-run"])
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(UserError, match="--tensor 8 does not divide the 4 attention heads"):
        _run(["convert", source, str(folder / "out"), "--to", "megatron", "--tensor", "8", "--dry-run"])


def test_names_that_are_written_out_are_those_of_the_tables() -> None:
    assert list(FORMATS) == list(commands.FORMAT_NAMES)
    assert list(DTYPES) == list(DTYPE_NAMES)
