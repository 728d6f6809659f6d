# SPDX-License-Identifier: Apache-2.0
"""Wrongly read query, key and value rows are recognized from trained weights, and only from those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert.convert.conversion import convert
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.verification import verify
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining, loss_sums
from megatron_bert.model.sequences import SequenceLayout
from parallel.errors import UserError
from parallel.sharding import initialize

WORDS = (
    *("the", "a", "cat", "dog", "man", "bird", "fish", "sees", "hears", "likes", "finds", "knows"),
    *("red", "old", "big", "small", "near", "far", "house", "tree"),
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTH, BATCH, STEPS = 14, 32, 250


def _batch(generator: torch.Generator) -> MicroBatch:
    """Sentences in which every word comes twice in a row, so that a masked one can be read off its neighbor."""
    words = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (BATCH, LENGTH // 2 - 1), generator=generator)
    body = words.repeat_interleave(2, dim=1)
    tokens = torch.cat((torch.full((BATCH, 1), 2), body, torch.full((BATCH, 1), 3)), dim=1)
    places = 1 + torch.randint(0, LENGTH - 2, (BATCH,), generator=generator)
    slots = torch.arange(BATCH) * LENGTH + places
    flat = tokens.flatten()
    labels = flat[slots].clone()
    flat[slots] = 4
    count = BATCH * LENGTH
    return MicroBatch(
        tokens=flat,
        positions=torch.arange(LENGTH).repeat(BATCH),
        types=torch.zeros(count, dtype=torch.int64),
        samples=torch.arange(BATCH).repeat_interleave(LENGTH),
        layout=SequenceLayout.rectangle(BATCH, LENGTH),
        slots=slots,
        slot_labels=labels,
        first_tokens=torch.arange(BATCH) * LENGTH,
        pair_labels=torch.full((BATCH,), -100),
        lengths=(LENGTH,) * BATCH,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, and two native checkpoints: a model as it is initialized, and after training."""
    place = tmp_path_factory.mktemp("trained")
    (place / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    config = MegatronBertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        layer_norm_eps=1e-5,
        vocab_size_multiple=8,
        initializer_range=0.1,
        scaled_output_init=False,
    )
    model = BertForPretraining(config)
    initialize(model, 1)
    _save(model, place / "untrained")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    for _ in range(STEPS):
        batch = _batch(generator)
        loss = loss_sums(model(batch), batch, config.vocab_size).masked / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5, "the model did not learn what the test is about"
    _save(model, place / "trained")
    return place


def _save(model: BertForPretraining, target: Path) -> None:
    from megatron_bert.convert.formats import FORMATS
    from megatron_bert.convert.state import CanonicalState, SourceFacts, StateTensor

    words = model.config.vocab_size
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("embeddings.word_embeddings.weight", "masked_head.bias"):
        tensors[name] = tensors[name][:words].clone()
    state = CanonicalState(
        config=model.config,
        facts=SourceFacts(format="native", variant="", files=1, stored_rows=words),
        tensors={n: StateTensor.held(t, n) for n, t in tensors.items()},
    )
    target.mkdir()
    FORMATS["native"].write(state, target, WriteOptions())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("true", [0.0, 1.0, 2.0, 3.0])
def test_a_wrong_version_is_recognized_and_the_right_one_named(
    folder: Path, tmp_path: Path, true: float, tensor: int
) -> None:
    convert(
        folder / "trained", tmp_path / "m", to="megatron", write=WriteOptions(checkpoint_version=true, tensor=tensor)
    )
    for read in (None, 0.0, 1.0, 3.0):
        options = ReadOptions(checkpoint_version=read)
        report = convert(tmp_path / "m", tmp_path / "out", to="native", read=options, dry_run=True)
        doubts = [warning for warning in report.warnings if "look as if" in warning]
        right = read is None or min(read, 2.0) == min(true, 2.0)
        assert bool(doubts) != right, (read, doubts)
        if not right:
            assert f"--source-checkpoint-version {3 if true == 2 else true:g}" in doubts[0]


def test_a_result_of_a_mistaken_converter_is_recognized(folder: Path, tmp_path: Path) -> None:
    convert(folder / "trained", tmp_path / "m", to="megatron", write=WriteOptions(checkpoint_version=0.0))
    wrong = ReadOptions(checkpoint_version=3.0)
    convert(tmp_path / "m", tmp_path / "wrong", to="huggingface", read=wrong)
    report = convert(tmp_path / "wrong", tmp_path / "out", to="native", dry_run=True)
    assert any("look shuffled" in warning and "convert from the original" in warning for warning in report.warnings)
    report = convert(folder / "trained", tmp_path / "out", to="native", dry_run=True)
    assert not any("look" in warning for warning in report.warnings)


def test_untrained_weights_raise_no_doubt(folder: Path, tmp_path: Path) -> None:
    convert(folder / "untrained", tmp_path / "m", to="megatron", write=WriteOptions(checkpoint_version=1.0))
    for read in (0.0, 1.0, 3.0):
        report = convert(
            tmp_path / "m", tmp_path / "out", to="native", read=ReadOptions(checkpoint_version=read), dry_run=True
        )
        assert not any("look" in warning for warning in report.warnings)


def test_verification_reports_the_loss_and_better_orders(folder: Path, tmp_path: Path) -> None:
    convert(folder / "trained", tmp_path / "m", to="megatron", write=WriteOptions(checkpoint_version=0.0))
    texts = tmp_path / "texts.txt"
    texts.write_text("the the cat cat sees sees a a bird bird\na a man man hears hears the the dog dog\n")
    write = WriteOptions(tokenizer=folder / "vocab.txt")
    report = convert(tmp_path / "m", tmp_path / "hf", to="huggingface", write=write, verify_text=texts)
    found = report.verification
    assert found is not None
    assert found.loss < 1 < found.chance
    assert min(found.other_orders.values()) > found.loss
    assert "knows this language" in str(report)
    assert (tmp_path / "hf/tokenizer.json").is_file()

    from megatron_bert.convert.opening import open_checkpoint

    with open_checkpoint(tmp_path / "m", ReadOptions(checkpoint_version=3.0)) as state:
        misread = verify(state, load_tokenizer(folder / "vocab.txt"), texts)
    assert misread.loss > found.loss + 0.5
    assert "fit better as checkpoint version 0" in misread.verdict
    with open_checkpoint(folder / "untrained") as state:
        assert "no better than at random" in verify(state, load_tokenizer(folder / "vocab.txt"), texts).verdict


def test_verification_needs_a_vocabulary(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tokenizer"):
        convert(folder / "trained", tmp_path / "out", to="native", verify_text=True)
