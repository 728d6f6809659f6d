# SPDX-License-Identifier: Apache-2.0
"""A model that does not fit on the disk is said in one sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import modeling_utils

from megatron_bert import MegatronBertConfig, MegatronBertModel
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from parallel import whole_files
from parallel.errors import UserError
from tests.megatron_bert.data.support import small_vocabulary

CONFIG = MegatronBertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes the first bytes of a file only."""
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        file = opened(path, *arguments, **named)
        if path.name.endswith(".partial"):
            write = file.write

            def half(content: Any) -> int:
                write(content[: len(content) // 2])
                file.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            file.write = half
        return file

    monkeypatch.setattr(whole_files.Path, "open", refuse)


def test_what_was_there_stays(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A configuration and a vocabulary that cannot be written leave those of the model before."""
    vocabulary = load_tokenizer(small_vocabulary(tmp_path, ["a", "b"]))
    folder = tmp_path / "model"
    CONFIG.save_pretrained(folder)
    save_tokenizer(vocabulary, folder, 20)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    request.getfixturevalue("full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"):
        CONFIG.replaced(layer_norm_eps=0.5).save_pretrained(folder)
    with pytest.raises(UserError, match=r"No space left on device.*: make room"):
        save_tokenizer(vocabulary, folder, 10)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeling_utils, "safe_save_file", refuse)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*: make room"):
        MegatronBertModel(CONFIG).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
