# SPDX-License-Identifier: Apache-2.0
"""Megatron checkpoints of all eras against the forward pass written from their layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert.convert.inspection import inspect
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, arguments, draw, forward, write_checkpoint, write_zip
from tests.megatron_bert.convert.support import assert_same_logits, logits_of, make_inputs

SIZES = Sizes()
_LEGACY = [
    (era, version, tensor, pipeline, virtual)
    for era in ("transformer", "encoder", "norm")
    for version in (None, 1.0, 2.0, 3.0)
    for tensor, pipeline, virtual in ((1, 1, 1), (2, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 1))
]
_CORE = [
    (era, 3.0, tensor, pipeline, virtual)
    for era in ("core", "core-fused")
    for tensor, pipeline, virtual in ((1, 1, 1), (2, 2, 1), (4, 2, 2))
]


@pytest.mark.parametrize(("era", "version", "tensor", "pipeline", "virtual"), _LEGACY + _CORE)
def test_every_era_gives_the_logits_of_its_layout(
    tmp_path: Path, era: str, version: float | None, tensor: int, pipeline: int, virtual: int
) -> None:
    weights = draw(SIZES)
    write_checkpoint(
        tmp_path, weights, SIZES, era=era, version=version, tensor=tensor, pipeline=pipeline, virtual=virtual
    )
    inputs = make_inputs(SIZES)
    actual = logits_of(tmp_path, SIZES, true_vocab_size=SIZES.words)
    assert_same_logits(actual, forward(weights, *inputs), inputs[2])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_files_of_old_and_new_torch_with_and_without_training_state(tmp_path: Path, stream: bool, extras: bool) -> None:
    weights = draw(SIZES, dtype=torch.float16)
    write_checkpoint(tmp_path, weights, SIZES, stream=stream, extras=extras, iteration=1200, tensor=2)
    inputs = make_inputs(SIZES)
    actual = logits_of(tmp_path, SIZES, true_vocab_size=SIZES.words)
    assert_same_logits(actual, forward(weights, *inputs), inputs[2])
    assert ("step", "1200") in inspect(tmp_path).rows


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_ngc_zip_without_arguments_version_or_tracker(tmp_path: Path, compressed: bool, stream: bool) -> None:
    weights = draw(SIZES, dtype=torch.float16)
    folder = write_checkpoint(
        tmp_path / "ngc", weights, SIZES, era="transformer", version=None, args=None, stream=stream, tracker=False
    )
    archive = write_zip(tmp_path / "megatron_bert.zip", folder, compressed=compressed)
    inputs = make_inputs(SIZES)
    actual = logits_of(archive, SIZES, true_vocab_size=SIZES.words, num_attention_heads=SIZES.heads)
    assert_same_logits(actual, forward(weights, *inputs), inputs[2])
    notes = " ".join(inspect(archive, _heads()).suspicious)
    assert "no checkpoint version is stored" in notes
    assert "epsilon" in notes
    assert "GELU" in notes


def _heads() -> object:
    from megatron_bert.convert.options import ReadOptions

    return ReadOptions(num_attention_heads=SIZES.heads)


def test_a_version_that_is_not_stored_can_be_given(tmp_path: Path) -> None:
    weights = draw(SIZES)
    folder = write_checkpoint(tmp_path, weights, SIZES, era="transformer", version=1.0)
    path = folder / "release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    del content["checkpoint_version"]
    torch.save(content, path)
    inputs = make_inputs(SIZES)
    expected = forward(weights, *inputs)
    actual = logits_of(path, SIZES, true_vocab_size=SIZES.words, checkpoint_version=1.0)
    assert_same_logits(actual, expected, inputs[2])
    wrong = logits_of(path, SIZES, true_vocab_size=SIZES.words)
    assert not torch.allclose(wrong[0][inputs[2]], expected[0][inputs[2]], atol=0.1)


def test_bare_file_and_single_rank_folder(tmp_path: Path) -> None:
    weights = draw(SIZES)
    folder = write_checkpoint(tmp_path, weights, SIZES, era="norm")
    inputs = make_inputs(SIZES)
    expected = forward(weights, *inputs)
    for place in ("release/mp_rank_00/model_optim_rng.pt", "release/mp_rank_00", "release"):
        actual = logits_of(folder / place, SIZES, true_vocab_size=SIZES.words)
        assert_same_logits(actual, expected, inputs[2])


def test_without_binary_head(tmp_path: Path) -> None:
    sizes = Sizes(binary_head=False)
    weights = draw(sizes)
    write_checkpoint(tmp_path, weights, sizes, tensor=2, pipeline=2)
    inputs = make_inputs(sizes)
    actual = logits_of(tmp_path, sizes, true_vocab_size=sizes.words)
    assert_same_logits(actual, forward(weights, *inputs), inputs[2])


@pytest.mark.parametrize(("gelu", "eps"), [("erf", 1e-5), ("tanh", 1e-3)])
def test_gelu_and_epsilon_are_carried(tmp_path: Path, gelu: str, eps: float) -> None:
    weights = draw(SIZES)
    write_checkpoint(tmp_path, weights, SIZES, args=arguments(SIZES, 1, 1, eps=eps, tanh=gelu == "tanh"))
    inputs = make_inputs(SIZES)
    actual = logits_of(tmp_path, SIZES, true_vocab_size=SIZES.words)
    assert_same_logits(actual, forward(weights, *inputs, eps=eps, gelu=gelu), inputs[2])


def test_the_newest_iteration_is_the_tracked_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw(SIZES, seed=1), SIZES, iteration=100)
    weights = draw(SIZES, seed=2)
    write_checkpoint(tmp_path, weights, SIZES, iteration=200)
    inputs = make_inputs(SIZES)
    actual = logits_of(tmp_path, SIZES, true_vocab_size=SIZES.words)
    assert_same_logits(actual, forward(weights, *inputs), inputs[2])
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(UserError, match="several checkpoints"):
        inspect(tmp_path)


def test_padding_counts_as_words_when_the_true_size_is_unknown(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw(SIZES), SIZES, tensor=2)
    rows = dict(inspect(tmp_path).rows)
    assert rows["vocabulary"] == "256 rows, all taken as words (the true number is not stored)"
    assert rows["layout"] == "tensor 2 x pipeline 1, 2 files"
