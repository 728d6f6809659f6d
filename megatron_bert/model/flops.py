# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of BERT pretraining, for the MFU."""

from __future__ import annotations

from megatron_bert.model.configuration import MegatronBertConfig


def parameter_count(config: MegatronBertConfig) -> int:
    """Trainable numbers of the whole model, padding of the vocabulary included, tied embeddings once."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    tables = config.padded_vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
    masked_head = hidden * (hidden + 1) + 2 * hidden + config.padded_vocab_size
    pair_head = hidden * (hidden + 1) + 2 * (hidden + 1) if config.binary_head else 0
    return tables * hidden + config.num_hidden_layers * layer + 2 * hidden + masked_head + pair_head


def training_flops(
    config: MegatronBertConfig, tokens: float, squared_lengths: float, predictions: float, pairs: float
) -> float:
    """Operations of one forward and backward pass, a multiply and an add counted as two.

    Backward counts twice the forward; recomputation does not count; attention is bidirectional, so its scores are not
    halved; the vocabulary matrix works on predicted positions only.

    Args:
        config: sizes of the encoder.
        tokens: real tokens, without padding.
        squared_lengths: sum of the squared lengths of the sequences those tokens form.
        predictions: masked positions.
        pairs: sequences given to the sentence-pair head.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    matrices = tokens * (8 * hidden * hidden + 4 * hidden * ffn)
    scores = 4 * squared_lengths * hidden
    masked_head = predictions * (2 * hidden * hidden + 2 * hidden * config.padded_vocab_size)
    pair_head = pairs * (2 * hidden * hidden + 4 * hidden) if config.binary_head else 0
    return 3.0 * (config.num_hidden_layers * (matrices + scores) + masked_head + pair_head)


def head_in_layers(config: MegatronBertConfig, length: int, predictions: float) -> float:
    """What the masked-language head costs, in layers.

    Args:
        config: sizes of the encoder.
        length: tokens per sample.
        predictions: masked positions per sample.
    """
    layer = 4 * config.hidden_size + 2 * config.intermediate_size + 2 * length
    return predictions / length * (config.hidden_size + config.padded_vocab_size) / layer


#: Dense peak of bfloat16 / float16 matrix products by device name, in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "V100": 125.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}


def peak_tflops(device_name: str, compute: str) -> float | None:
    """Peak of a device for a compute format, in TFLOP/s; None where it is not known (CPUs, float32)."""
    if compute == "float32":
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
