# SPDX-License-Identifier: Apache-2.0
"""Guessing masked words with a checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_bert.cli import main
from megatron_bert.data.tokenizers import load_tokenizer, tokenizer_of_run
from megatron_bert.data.train_tokenizer import train_tokenizer
from megatron_bert.family.tokenizer import AutoTokenizer, save_tokenizer
from megatron_bert.finetuning.fill_mask import FillMask
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.training.pretrain import pretrain
from parallel.errors import UserError
from tests.megatron_bert.training.layouts import LENGTH, make_data
from tests.megatron_bert.training.runs import run_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_data(folder)
    pretrain(run_settings(folder, folder / "run", training__steps=3))
    return folder / "run"


def test_from_a_run_and_from_its_checkpoint(run: Path) -> None:
    text = "w1 [MASK] w4"
    guesses = FillMask.from_checkpoint(run)(text, top=4)
    assert guesses == FillMask.from_checkpoint(run / "checkpoints" / "step_00000003")(text, top=4)
    chances = [guess.probability for guess in guesses]
    assert len(chances) == 4
    assert chances == sorted(chances, reverse=True)
    assert 0 < sum(chances) <= 1
    assert not any(guess.token.startswith("[") for guess in guesses)
    for guess in guesses:
        if not guess.token.startswith("##"):
            assert guess.sentence == f"w1 {guess.token} w4"


def test_the_run_keeps_its_tokenizer(run: Path) -> None:
    """The vocabulary it was trained with may be gone."""
    copy = tokenizer_of_run(run / "checkpoints" / "step_00000003")
    assert copy == run / "tokenizer"
    original = run.parent / "vocab.txt"
    assert load_tokenizer(copy).fingerprint == load_tokenizer(original).fingerprint
    original.rename(run.parent / "moved.txt")
    try:
        assert FillMask.from_checkpoint(run)("w1 [MASK]")
    finally:
        (run.parent / "moved.txt").rename(original)


def test_another_vocabulary_in_the_run_is_refused(run: Path) -> None:
    path = run / "tokenizer" / "tokenizer.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace('"w1"', '"other"'), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"trained with another vocabulary than that in .*tokenizer"):
            FillMask.from_checkpoint(run)
    finally:
        path.write_text(before, encoding="utf-8")


def test_probabilities_are_of_all_words(run: Path) -> None:
    model = FillMask.from_checkpoint(run)
    tokenizer, special = model.tokenizer, model.tokenizer.special_ids
    tokens = torch.tensor([tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id])
    with torch.no_grad():
        logits = model.model(MicroBatch.of_one(tokens, torch.tensor([1]))).masked[0, : tokenizer.vocab_size]
    found = {guess.token: guess.probability for guess in model("[MASK]", top=tokenizer.vocab_size)}
    chances = enumerate(logits.softmax(0).tolist())
    assert found == {tokenizer.id_to_token(number): chance for number, chance in chances if number not in special}
    assert sum(found.values()) < 1


def test_several_masks_in_order(run: Path) -> None:
    model = FillMask.from_checkpoint(run)
    assert len(model("[MASK] w1 [MASK]", top=3)) == 6
    assert len(model("[MASK]", top=3)) == 3


@pytest.mark.parametrize("takes_space", [True, False])
def test_masks_of_vocabularies_with_spaces_are_read_as_transformers_does(tmp_path: Path, takes_space: bool) -> None:
    """True in those that are trained here; with False, the space before a mask is a token of its own."""
    (tmp_path / "text.txt").write_text("the cat sat\n\nthe dog sat\n" * 20, encoding="utf-8")
    train_tokenizer([tmp_path / "text.txt"], "bpe", 270, tmp_path / "made")
    path = tmp_path / "made" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    mask = next(token for token in content["added_tokens"] if token["content"] == "[MASK]")
    assert mask["lstrip"]
    mask["lstrip"] = takes_space
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    config = MegatronBertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ours = FillMask(BertForPretraining(config, device="meta"), tokenizer)
    save_tokenizer(tokenizer, tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("the [MASK] sat", "the[MASK] sat", "[MASK] cat"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_text_without_mask(run: Path) -> None:
    with pytest.raises(UserError, match=r"'w1 w2' holds no \[MASK\]: put one"):
        FillMask.from_checkpoint(run)("w1 w2")


def test_too_long(run: Path) -> None:
    model = FillMask.from_checkpoint(run)
    fits = " ".join(["[MASK]", *["w1"] * (LENGTH - 3)])  # beside [CLS] and [SEP]
    assert len(model(fits, top=1)) == 1
    with pytest.raises(UserError, match=f"the text has {LENGTH + 1} tokens, but the model takes {LENGTH}: shorten it"):
        model(fits + " w1")


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill-mask", str(run), "w1 [MASK]", "[MASK] w4", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == ["w1 [MASK]", "[MASK] w4"]
    assert len(lines) == 6
    assert all("%" in lines[index] for index in (1, 2, 4, 5))


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill-mask", str(tmp_path), "[MASK]"]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path} is not a checkpoint of a kind that is known" in err
    assert err.count("\n") == 1
