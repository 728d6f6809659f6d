# SPDX-License-Identifier: Apache-2.0
"""Counted operations and parameters against torch's own count on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.flops import parameter_count, peak_tflops, training_flops
from megatron_bert.model.pretraining import BertForPretraining, PretrainingLogits
from megatron_bert.model.sequences import SequenceLayout

META = torch.device("meta")
SEQUENCES, LENGTH, SLOTS = 3, 16, 6


def tiny(binary_head: bool = True) -> MegatronBertConfig:
    return MegatronBertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        vocab_size_multiple=32,
        binary_head=binary_head,
    )


def full_batch() -> MicroBatch:
    def whole(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=META)

    return MicroBatch(
        tokens=whole(SEQUENCES * LENGTH),
        positions=whole(SEQUENCES * LENGTH),
        types=whole(SEQUENCES * LENGTH),
        samples=whole(SEQUENCES * LENGTH),
        layout=SequenceLayout.rectangle(SEQUENCES, LENGTH),
        slots=whole(SLOTS),
        slot_labels=whole(SLOTS),
        first_tokens=whole(SEQUENCES),
        pair_labels=whole(SEQUENCES),
        lengths=(LENGTH,) * SEQUENCES,
    )


@pytest.mark.parametrize("binary_head", [True, False])
def test_operations(binary_head: bool) -> None:
    config = tiny(binary_head)
    model = BertForPretraining(config, device=META)
    # On the meta device attention takes the kernel made of matrix products, which torch counts; fused ones it may not.
    with FlopCounterMode(display=False) as counter:
        logits = model(full_batch())
        assert isinstance(logits, PretrainingLogits)
        loss = logits.masked.sum()
        (loss if logits.pair is None else loss + logits.pair.sum()).backward()
    expected = training_flops(config, SEQUENCES * LENGTH, SEQUENCES * LENGTH**2, SLOTS, SEQUENCES)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("binary_head", [True, False])
def test_parameters(binary_head: bool) -> None:
    config = tiny(binary_head)
    model = BertForPretraining(config, device=META)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("device", "compute", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-40GB", "float16", 312.0),
        ("NVIDIA A100-SXM4-40GB", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks(device: str, compute: str, expected: float | None) -> None:
    assert peak_tflops(device, compute) == expected
