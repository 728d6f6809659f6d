# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/ loads, fits the layouts it suggests, has the sizes it claims, and trains at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.config_file import load_settings
from megatron_bert.data.preprocess import preprocess
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.training.metrics_file import METRICS_FILE, read_metrics
from megatron_bert.training.pretrain import pretrain
from parallel.checkpoint import latest_checkpoint

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
FILES = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

#: World sizes a file is meant for; its comments list the same.
WORLD_SIZES = {
    "bert_tiny": (1, 2, 4),
    "bert_345m": (1, 8, 32),
    "bert_345m_fast": (1, 8, 32),
    "bert_1.3b": (1, 8, 64),
    "bert_3.9b": (8, 64, 256),
}

#: Millions of parameters with the paper's vocabulary: arXiv 1909.08053, section 5.3, counted with 30,592 rows.
MILLIONS = {"bert_345m": 336.3, "bert_1.3b": 1280.7, "bert_3.9b": 3869.3}

#: What makes any of them small, and fit one process without a compiler.
SHRINK = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.workers=0",
    "data.split=80,20,0",
    "data.seq_length=32",
    "parallel.tensor=1",
    "parallel.sequence=false",
    "training.device=cpu",
    "training.compile=false",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.evaluate_batches=1",
    "training.steps=2",
    "logging.every=1",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tokenizer and a corpus of a few made-up documents."""
    folder = tmp_path_factory.mktemp("corpus")
    line = "the model reads a long sentence about every small word then writes another"
    words = line.split()
    sentences = [" ".join(words[(i * k) % len(words)] for k in range(1, 13)).capitalize() + "." for i in range(97)]
    documents = ["\n".join(sentences[(7 * d + s) % len(sentences)] for s in range(12)) for d in range(40)]
    text = folder / "text.txt"
    text.write_text("\n\n".join(documents), encoding="utf-8")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]), encoding="utf-8")
    report = preprocess([text], vocabulary, folder / "corpus", lowercase=True, progress=False)
    return [f"tokenizer.path={vocabulary}", "tokenizer.lowercase=true", f"data.train={report.prefix}"]


def test_every_file_is_known() -> None:
    assert {path.stem for path in CONFIGS} == set(WORLD_SIZES)


@FILES
def test_fits_the_layouts_it_suggests(path: Path) -> None:
    settings = load_settings(path, [])
    for world_size in WORLD_SIZES[path.stem]:
        assert check_settings(settings, world_size).world_size == world_size


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_count_is_the_papers(name: str) -> None:
    settings = load_settings(_path(name), [])
    config = settings.model_config_for(vocab_size=30522, pad_token_id=0)
    assert config.padded_vocab_size == 30592
    assert config.head_dim == 64
    model = BertForPretraining(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)


@pytest.mark.parametrize("name", MILLIONS)
def test_recipe_is_the_papers(name: str) -> None:
    settings = load_settings(_path(name), [])
    training, rate, data = settings.training, settings.learning_rate, settings.data
    assert (training.global_batch_size, training.steps, data.seq_length) == (1024, 2_000_000, 512)
    assert (rate.peak, rate.warmup_steps, rate.decay_steps, rate.schedule) == (1e-4, 10_000, 2_000_000, "linear")
    assert (data.pair_objective, data.whole_word_masking, data.max_ngram) == ("sop", True, 3)
    assert (settings.optimizer.weight_decay, settings.optimizer.clip_grad_norm) == (0.01, 1.0)
    assert (settings.model.hidden_dropout_prob, settings.model.attention_probs_dropout_prob) == (0.1, 0.1)


def test_the_fast_recipe_is_the_papers_without_attention_dropout() -> None:
    fast, slow = (load_settings(_path(name), ["training.run_dir=run"]) for name in ("bert_345m_fast", "bert_345m"))
    assert fast.model.attention_probs_dropout_prob == 0.0
    model = fast.model.model_copy(update={"attention_probs_dropout_prob": 0.1})
    assert fast.model_copy(update={"model": model}) == slow


@FILES
def test_trains_at_tiny_size(path: Path, corpus: list[str], tmp_path: Path) -> None:
    settings = load_settings(path, [*SHRINK, *corpus, f"training.run_dir={tmp_path}", *_short_schedule(path)])
    pretrain(settings)
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "valid_mlm_loss" in row] == [2]
    assert rows[-1]["checkpoint_bytes"] > 0
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step_00000002"


def _short_schedule(path: Path) -> list[str]:
    rate = load_settings(path, []).learning_rate
    # A decay that ends far beyond the last step is fine; one that ends before the warm-up does is not.
    return [] if rate.decay_steps is not None else ["learning_rate.warmup_steps=1"]


def _path(name: str) -> Path:
    return next(path for path in CONFIGS if path.stem == name)


def test_settings_written_out_read_back(tmp_path: Path) -> None:
    settings = load_settings(_path("bert_3.9b"), [])
    written = tmp_path / "config.yaml"
    written.write_text(settings.dump(), encoding="utf-8")
    again: Settings = load_settings(written, [])
    assert again == settings
