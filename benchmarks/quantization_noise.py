# SPDX-License-Identifier: Apache-2.0
"""Signal to noise of a quantized stack of random layers against the float one, for every setting that could matter.

The stack is calibrated on some random sequences and measured on others; weights are large enough for attention and GELU
to be far from linear. ``outliers`` makes two channels of the residual stream some twenty times larger than the rest.

    python -m benchmarks.quantization_noise --output benchmarks/quantization_noise.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import provenance, publish
from megatron_bert.ending import command
from megatron_bert.ibert import QuantizationConfig, calibrate, in_mode, quantize_model
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.encoder import BertEmbeddings, Encoder
from megatron_bert.model.sequences import SequenceLayout
from parallel.sharding import initialize

_OUTLIER_CHANNELS, _OUTLIER = [7, 130], 20.0
#: Name -> settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W7A8": {"weight_bits": 7},
    "W7A7": {"weight_bits": 7, "activation_bits": 7},
    "W7A8, attention 7 bits": {"weight_bits": 7, "attention_bits": 7},
    "residual 12 bits": {"residual_bits": 12},
    "residual 10 bits": {"residual_bits": 10},
    "percentile": {"observer": "percentile"},
    "mse": {"observer": "mse"},
    "no equalization": {"equalization": "none"},
    "gelu in float": {"force_dequant": "gelu"},
    "softmax in float": {"force_dequant": "softmax"},
    "layer norm in float": {"force_dequant": "layernorm"},
    "all three in float": {"force_dequant": "nonlinear"},
}


class Stack(nn.Module):
    """Embeddings and layers."""

    def __init__(self, placement: str, outliers: bool) -> None:
        super().__init__()
        config = MegatronBertConfig(
            vocab_size=90,
            hidden_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=1024,
            initializer_range=0.06,
            scaled_output_init=False,
            layer_norm_eps=1e-5,
            layer_norm_placement=placement,
        )
        self.embeddings, self.encoder = BertEmbeddings(config), Encoder(config)
        initialize(self, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
            if outliers:
                self.embeddings.position_embeddings.weight[:, _OUTLIER_CHANNELS] += _OUTLIER

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[B, S]`` to final hidden states ``[B * S, H]``."""
        batch, length = ids.shape
        positions = torch.arange(length).repeat(batch)
        hidden = self.embeddings(ids.flatten(), positions, torch.zeros(batch * length, dtype=torch.int64), None)
        return self.encoder(hidden, SequenceLayout.rectangle(batch, length), None)


@torch.no_grad()
def noise(placement: str, length: int, outliers: bool, settings: dict[str, Any]) -> float:
    """Signal to noise in dB."""
    torch.manual_seed(0)
    stack = Stack(placement, outliers).eval()
    quantize_model(stack, QuantizationConfig(**settings))
    calibrate(stack, [torch.randint(0, 90, (4, length))], stack)
    ids = torch.randint(0, 90, (4, length))
    integer = stack(ids)
    with in_mode(stack, "float"):
        real = stack(ids)
    return round(10 * math.log10(float(real.square().sum() / (integer - real).square().sum())), 1)


@command("benchmarks.quantization_noise")
def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/quantization_noise.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {**provenance("quantization_noise"), "unit": "dB"}
    for placement in ("pre", "post"):
        for name, length, outliers in (("128 tokens", 128, False), ("512 tokens", 512, False), ("outliers", 128, True)):
            chosen = {"W8A8": {}} if length == 512 else SETTINGS
            results = {title: noise(placement, length, outliers, settings) for title, settings in chosen.items()}
            report[f"{placement}-layer-norm, {name}"] = results
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
