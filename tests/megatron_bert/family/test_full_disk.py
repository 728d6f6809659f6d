# SPDX-License-Identifier: Apache-2.0
"""A model that does not fit on the disk is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import modeling_utils

from megatron_bert import MegatronBertConfig, MegatronBertModel
from parallel.errors import UserError


def test_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeling_utils, "safe_save_file", refuse)
    config = MegatronBertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*: make room"):
        MegatronBertModel(config).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
