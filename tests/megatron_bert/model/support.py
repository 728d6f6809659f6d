# SPDX-License-Identifier: Apache-2.0
"""A micro model and micro batches for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_bert.data.collate import collate_rows
from megatron_bert.data.sentence_pairs import Sample
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining, loss_sums
from megatron_bert.model.sequences import SequenceLayout
from parallel.cross_entropy import IGNORED
from parallel.gradients import sum_token_partial_gradients
from parallel.mesh import SINGLE, TensorParallel
from parallel.recompute import Recompute
from parallel.sharding import initialize

#: 91 words in a table of 96: with 4 tensor ranks the last holds some padding.
CONFIG = MegatronBertConfig(
    vocab_size=91,
    vocab_size_multiple=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
    layer_norm_eps=1e-5,
    initializer_range=0.3,  # large, so that every part of the model matters in its result
)
#: Lengths of the sequences of a micro batch; their sum and 5 x 12 are multiples of 4.
LENGTHS = (12, 5, 9, 2, 8)
LENGTH = 12
SLOTS = 12


def make_batch(*, packed: bool = False, samples: int = 100) -> MicroBatch:
    """Sequences of LENGTHS, as a padded rectangle or packed: the same tokens, labels and samples either way."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.tensor(LENGTHS)
    batch = len(LENGTHS)
    real = torch.arange(LENGTH) < lengths[:, None]
    tokens = torch.randint(1, CONFIG.vocab_size, (batch, LENGTH), generator=generator) * real
    positions = torch.arange(LENGTH).expand(batch, -1)
    types = (positions >= lengths[:, None] // 2).long() * real
    numbers = (samples + torch.arange(batch))[:, None].expand(-1, LENGTH)
    # Two masked tokens in each sequence, and two slots to spare.
    slots = torch.tensor([[row * LENGTH, row * LENGTH + length - 1] for row, length in enumerate(LENGTHS)]).flatten()
    labels = torch.randint(0, CONFIG.vocab_size, (len(slots),), generator=generator)
    labels[:3] = torch.tensor([0, CONFIG.vocab_size - 1, 48])
    spare = SLOTS - len(slots)
    first_tokens = torch.arange(batch) * LENGTH
    if packed:
        keep = real.flatten().nonzero()[:, 0]
        place = torch.full((batch * LENGTH,), -1)
        place[keep] = torch.arange(len(keep))
        tokens, positions, types, numbers = (t.flatten()[keep] for t in (tokens, positions, types, numbers))
        slots, first_tokens = place[slots], place[first_tokens]
        layout = SequenceLayout.packed(lengths, LENGTH)
    else:
        layout = SequenceLayout.rectangle(batch, LENGTH, real)
    return MicroBatch(
        tokens=tokens.flatten(),
        positions=positions.flatten(),
        types=types.flatten(),
        samples=numbers.flatten(),
        layout=layout,
        slots=torch.cat((slots, torch.zeros(spare, dtype=torch.int64))),
        slot_labels=torch.cat((labels, torch.full((spare,), IGNORED))),
        first_tokens=first_tokens,
        pair_labels=torch.tensor([0, 1, 1, IGNORED, 0]),
        lengths=LENGTHS,
    )


def make_rows(*, swapped: bool = False) -> MicroBatch:
    """The same sequences in rows of 16 tokens; on request with others together."""
    batch = make_batch()
    samples = []
    for place, length in enumerate(LENGTHS):
        here = slice(place * LENGTH, place * LENGTH + length)
        masked = (batch.slots // LENGTH == place) & (batch.slot_labels != IGNORED)
        samples.append(
            Sample(
                tokens=batch.tokens[here].numpy(),
                types=batch.types[here].numpy(),
                mask_positions=(batch.slots[masked] - place * LENGTH).numpy(),
                mask_labels=batch.slot_labels[masked].numpy(),
                pair_label=int(batch.pair_labels[place]),
            )
        )
    rows = ((0, 3), (1, 2), (4,)) if not swapped else ((0,), (2, 1, 3), (4,))
    given = [[(100 + place, samples[place]) for place in row] for row in rows]
    return collate_rows(given, length=16, most=3, slots=6)


def make_model(
    *, tp: TensorParallel = SINGLE, recompute: Recompute = "none", seed: int = 3, **changes: Any
) -> BertForPretraining:
    """A micro model with initial values, and biases and norms that are not just zeros and ones."""
    model = BertForPretraining(replace(CONFIG, **changes), tp=tp, recompute=recompute)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                whole = torch.randn(parameter.shape, generator=generator) * 0.2
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                part = whole.chunk(tp.size)[tp.rank] if isinstance(parameter, DTensor) else whole
                local.copy_(part + ("norm.weight" in name))
    return model


def total_loss(model: BertForPretraining, batch: MicroBatch, dropout_seed: int | None = None) -> Tensor:
    """Mean masked-token loss plus mean pair loss."""
    sums = loss_sums(model(batch, dropout_seed), batch, model.config.vocab_size, model.tp)
    return sums.masked / (batch.slot_labels != IGNORED).sum() + sums.pair / (batch.pair_labels != IGNORED).sum()


def whole(tensor: Tensor) -> Tensor:
    """The undivided tensor; every rank must call."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(model: BertForPretraining, batch: MicroBatch, dropout_seed: int | None = None) -> dict[str, Tensor]:
    """Loss, and the gradient of every parameter by name, undivided."""
    loss = total_loss(model, batch, dropout_seed)
    loss.backward()
    sum_token_partial_gradients(model, model.tp)
    results = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        results[name] = whole(parameter.grad)
    return results


def assert_steps_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Losses and gradients equal to ``tolerance`` of the largest element of each (0: bit for bit)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )
