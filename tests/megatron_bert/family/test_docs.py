# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/models.md, with a small model in the directory they name."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.distributed import run as torchrun

import megatron_bert
from megatron_bert import (
    AutoTokenizer,
    IBertConfig,
    IBertForMaskedLM,
    IBertForSequenceClassification,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
)
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.ibert import named_ranges
from tests.commands import run_ranks
from tests.megatron_bert.family.support import HEADS
from tests.megatron_bert.ibert.family import support as ibert
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer

DOCS = Path(__file__).resolve().parents[3] / "docs" / "models.md"
COMMAND = re.compile(r"```bash\n(.*?)\n```", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def _small_model(folder: Path, text: str) -> None:
    words = sorted(set(re.findall(r"\w+|[^\w\s]", text)))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    vocabulary = load_tokenizer(folder)
    config = MegatronBertConfig(
        vocab_size=vocabulary.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    MegatronBertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(vocabulary, folder, 64)


def _small_ibert(folder: Path, text: str) -> None:
    folder.mkdir()
    write_roberta_tokenizer(folder, text.splitlines(), max_length=256)
    words = len(AutoTokenizer.from_pretrained(folder))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    IBertForMaskedLM(IBertConfig(vocab_size=words, max_position_embeddings=258, **sizes)).save_pretrained(folder)


def test_examples_run(tmp_path, monkeypatch):
    text = DOCS.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) >= 8
    (tmp_path / "megatron-bert-345m").mkdir()
    _small_model(tmp_path / "megatron-bert-345m", "\n".join(blocks))
    _small_ibert(tmp_path / "ibert-roberta-base", "\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{DOCS.name}, example {number}", "exec"), names)
    assert names["last_hidden_states"].shape[-1] == 32
    assert names["prediction_logits"].shape[-1] == len(AutoTokenizer.from_pretrained("megatron-bert-345m"))
    assert names["written"].dim() == 2
    assert isinstance(names["float_model"], IBertForSequenceClassification)
    assert not named_ranges(names["float_model"])
    assert all(float(limit) > 0 for limit in named_ranges(names["model"]).values())
    assert names["loss"].isfinite()


def test_a_divided_model_runs_under_torchrun(tmp_path):
    """The program of the section on tensor parallelism, as the command beside it starts its ranks."""
    text = DOCS.read_text(encoding="utf-8").partition("## Tensor parallelism")[2]
    program, (command,) = BLOCK.findall(text)[0], COMMAND.findall(text)
    (tmp_path / "megatron-bert-345m").mkdir()
    _small_model(tmp_path / "megatron-bert-345m", program)
    (tmp_path / "divided.py").write_text(program)
    launcher, *words = command.split()
    given = torchrun.parse_args(words)
    assert launcher == "torchrun"
    assert given.standalone
    ended = run_ranks(int(given.nproc_per_node), given.training_script, folder=tmp_path, python=True)
    assert [rank.code for rank in ended] == [0, 0], ended
    one = MegatronBertForPreTraining.from_pretrained(tmp_path / "megatron-bert-345m")
    copy = MegatronBertForMaskedLM.from_pretrained(tmp_path / "copy")
    assert copy.get_input_embeddings().weight.equal(one.get_input_embeddings().weight)


def test_every_class_is_in_the_table():
    text = DOCS.read_text(encoding="utf-8")
    for head in HEADS:
        assert f"| `MegatronBert{head}` |" in text
    for head in ibert.HEADS:
        assert f"| `IBert{head}` |" in text
    assert sorted(megatron_bert.__all__) == megatron_bert.__all__
    assert all(getattr(megatron_bert, name) is not None for name in megatron_bert.__all__)
