# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/ibert.md, one after another on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron_bert import MegatronBertConfig
from megatron_bert.family.classification import MegatronBertForSequenceClassification
from megatron_bert.ibert import QuantizerReport, quantized_modules

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs" / "ibert.md"


def test_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = MegatronBertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = MegatronBertForSequenceClassification(config).eval()
    names = {"model": model, "batches": [{"input_ids": torch.randint(1, 90, (3, 12))}]}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert list(quantized_modules(model))
    assert all(isinstance(row, QuantizerReport) for row in names["rows"])
    assert "encoder.layer.1.ranges.gelu" in capsys.readouterr().out
    assert (tmp_path / "ranges.png").is_file()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((\.\./[^)]+|[a-z_]+\.md)\)", DOCS.read_text(encoding="utf-8")):
        assert (DOCS.parent / target).is_file(), target
