# SPDX-License-Identifier: Apache-2.0
"""Inputs, and the logits of a state through this project's own model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.convert.options import ReadOptions
from megatron_bert.convert.state import CanonicalState
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.model.sequences import SequenceLayout
from tests.megatron_bert.convert.generator import Sizes


def make_inputs(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, types and mask ``[3, positions]``, with some padding."""
    generator = torch.Generator().manual_seed(7)
    shape = (3, sizes.positions)
    mask = torch.arange(sizes.positions) < torch.tensor([sizes.positions, 5, 9])[:, None]
    tokens = torch.randint(1, sizes.words, shape, generator=generator) * mask
    types = (torch.arange(sizes.positions) >= 3).expand(shape).long() * mask
    return tokens, types, mask


@torch.no_grad()
def state_logits(state: CanonicalState, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
    """Word logits at every position and pair logits of a state, computed by the native model in float64."""
    model = BertForPretraining(state.config).double()
    report = load_into(model, state)
    assert not report.missing
    assert not report.unexpected
    tokens, types, mask = make_inputs(sizes)
    batch, length = tokens.shape
    logits = model(
        MicroBatch(
            tokens=tokens.flatten(),
            positions=torch.arange(length).repeat(batch),
            types=types.flatten(),
            samples=torch.arange(batch).repeat_interleave(length),
            layout=SequenceLayout.rectangle(batch, length, mask),
            slots=torch.arange(batch * length),
            slot_labels=torch.zeros(batch * length, dtype=torch.int64),
            first_tokens=torch.arange(batch) * length,
            pair_labels=torch.zeros(batch, dtype=torch.int64),
            lengths=tuple(mask.sum(1).tolist()),
        )
    )
    return logits.masked[:, : sizes.words].unflatten(0, (batch, length)), logits.pair


def logits_of(source: Path, sizes: Sizes, **options: object) -> tuple[Tensor, Tensor | None]:
    """The same, of a checkpoint of any format."""
    with open_checkpoint(source, ReadOptions(**options)) as state:  # type: ignore[arg-type]
        return state_logits(state, sizes)


def assert_same_logits(
    actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], mask: Tensor, tolerance: float = 1e-5
) -> None:
    """Equal at real tokens; the model's attention probabilities are float32 at best."""
    torch.testing.assert_close(actual[0][mask], expected[0][mask], rtol=tolerance, atol=tolerance)
    assert (actual[1] is None) == (expected[1] is None)
    if actual[1] is not None and expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance)


def all_tensors(source: Path, **options: object) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under its canonical name."""
    with open_checkpoint(source, ReadOptions(**options)) as state:  # type: ignore[arg-type]
        return {name: tensor.load() for name, tensor in state.items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit for bit, with the same names and number formats."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
