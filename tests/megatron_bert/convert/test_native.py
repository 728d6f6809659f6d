# SPDX-License-Identifier: Apache-2.0
"""Native checkpoints: those of runs at several layouts, their optimizer, and loading into models that are divided."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bert.convert.conversion import convert
from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.training.update_rules import MOMENTS
from parallel.checkpoint import read_state
from parallel.checkpoint_reader import load_tensors
from parallel.checkpoint_writer import CheckpointWriter
from parallel.data_parallel import apply_data_parallel
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, draw, forward, write_checkpoint
from tests.megatron_bert.convert.support import (
    all_tensors,
    assert_same_logits,
    assert_same_tensors,
    logits_of,
    make_inputs,
)
from tests.worlds import make_mesh, run_world

SIZES = Sizes()
_WORDS = ReadOptions(true_vocab_size=SIZES.words)


def config_from(source: Path, options: ReadOptions | None = None) -> EncoderConfig:
    with open_checkpoint(source, options or ReadOptions()) as state:
        return state.config


def _trained_on_this_rank(source: Path, root: Path, layout: dict[str, Any], sharding: str) -> dict[str, Tensor]:
    """Load a checkpoint of Megatron into a divided model, save it as a run does; the whole tensors it holds."""
    mesh = make_mesh(**layout)
    config = config_from(source, _WORDS)
    model = BertForPretraining(config, tp=mesh.tensor_parallel)
    if sharding == "full":  # what is not divided over data ranks is loaded before it is wrapped, as a run does
        apply_data_parallel(model, model.encoder.layer_list(), mesh, sharding=sharding, compute_dtype=torch.float32)
    with open_checkpoint(source, _WORDS) as state:
        report = load_into(model, state)
    assert report.missing == report.unexpected == ()
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in parameters.items()}
    for moment in MOMENTS:
        tensors |= {f"optimizer.{moment}.{name}": torch.full_like(p, 0.25).detach() for name, p in parameters.items()}
    writer = CheckpointWriter(root, keep=0, asynchronous=False)
    writer.save(7, tensors, {"step": 7, "optimizer": {"steps": 7}, "config": asdict(config)})
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in parameters.items()
    }


def _check_divided(folder: Path, size: int, layout: dict[str, int], sharding: str) -> Path:
    """Load, save and read back at a layout; the checkpoint saved."""
    weights = draw(SIZES)
    source = write_checkpoint(folder / "megatron", weights, SIZES, tensor=4, pipeline=2)
    whole = run_world(size, _trained_on_this_rank, source, folder / "run", layout, sharding)[0]
    expected = all_tensors(source, true_vocab_size=SIZES.words)
    for name, tensor in expected.items():
        assert torch.equal(whole[name][: tensor.shape[0]], tensor), name
        assert not whole[name][tensor.shape[0] :].any(), name
    saved = folder / "run/step_00000007"
    assert_same_tensors(all_tensors(saved), expected)
    inputs = make_inputs(SIZES)
    assert_same_logits(logits_of(saved, SIZES), forward(weights, *inputs), inputs[2])
    return saved


def test_models_divided_over_data_ranks(tmp_path: Path) -> None:
    _check_divided(tmp_path, 2, {"data": 2, "data_shard": 2}, "full")


def test_models_divided_over_tensor_and_data_ranks(tmp_path: Path) -> None:
    _check_divided(tmp_path, 4, {"tensor": 2, "data": 2, "data_shard": 2}, "full")


def test_models_divided_over_tensor_ranks_and_their_optimizer(tmp_path: Path) -> None:
    saved = _check_divided(tmp_path, 2, {"tensor": 2}, "none")
    copy = tmp_path / "step_00000007"
    convert(saved, copy, to="native")
    assert read_state(copy)["optimizer"] == {"steps": 7}
    model = BertForPretraining(config_from(copy))
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in model.named_parameters()}
    for moment in MOMENTS:
        tensors |= {f"optimizer.{moment}.{name}": torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        load_tensors(copy, tensors)  # what a run does to resume
    with open_checkpoint(saved) as state:
        assert len(state.optimizer) == 2 * len(state)
        for name, tensor in state.optimizer.items():
            assert torch.equal(tensors[f"optimizer.{name}"][: tensor.shape[0]], tensor.load()), name
            assert bool((tensor.load() == 0.25).all())


def test_written_checkpoints_are_read_by_torch(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", draw(SIZES, dtype=torch.float16), SIZES)
    convert(source, tmp_path / "native", to="native", read=_WORDS, write=WriteOptions(dtype="float32"))
    model = BertForPretraining(config_from(tmp_path / "native"))
    with torch.no_grad():
        load_tensors(tmp_path / "native", {f"model.{name}": p for name, p in model.named_parameters()})
    for name, tensor in all_tensors(tmp_path / "native").items():
        assert torch.equal(dict(model.named_parameters())[name][: tensor.shape[0]], tensor), name


def test_a_part_of_a_model_takes_its_part(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", draw(SIZES), SIZES)
    model = BertForPretraining(config_from(source, _WORDS))
    with open_checkpoint(source, _WORDS) as state:
        report = load_into(model.encoder, state, vocab_size=SIZES.words)
    assert report.missing == ("layers.0.attention_norm.weight", *report.missing[1:])
    names = {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}
    holder = torch.nn.Module()
    holder.add_module("encoder", model.encoder)
    with open_checkpoint(source, _WORDS) as state:
        report = load_into(holder, state, vocab_size=SIZES.words)
    assert report.missing == ()
    assert not names & set(report.unexpected)
    assert "embeddings.word_embeddings.weight" in report.unexpected


def test_another_vocabulary_or_size_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", draw(SIZES), SIZES)
    config = config_from(source, _WORDS)
    with (
        open_checkpoint(source) as state,
        pytest.raises(UserError, match="has 128 words, but the tokenizer has 300"),
    ):
        load_into(BertForPretraining(config), state, vocab_size=300)
    config = config_from(write_checkpoint(tmp_path / "other", draw(Sizes(ffn=64)), Sizes(ffn=64)), _WORDS)
    with (
        open_checkpoint(source, _WORDS) as state,
        pytest.raises(UserError, match=r"dense_h_to_4h.weight has shape \[32, 16\]"),
    ):
        load_into(BertForPretraining(config), state)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", draw(SIZES), SIZES)
    convert(source, tmp_path / "native", to="native", read=_WORDS)
    path = tmp_path / "native" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"distcp has changed since it was written \(checksum of bytes"):
        all_tensors(tmp_path / "native")
