# SPDX-License-Identifier: Apache-2.0
"""A quantized classifier from its files alone: the specification's sections 4, 5 and 9 on what is in a directory.

Nothing of the package: JSON, safetensors' arrays and ``reference.py``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.megatron_bert.ibert import reference

Array = Any


def wide(acc: Array, scales: Array) -> Array:
    out = []
    for column, r in zip(acc.T, scales, strict=True):
        f, x = math.frexp(float(r))
        m, e = math.floor(f * 2**23 + 0.5), 23 - x
        if m == 2**23:
            m, e = 2**22, e - 1
        out.append(np.clip((column * m + (np.int64(1) << (e - 1))) >> e, -(2**24) + 1, 2**24 - 1))
    return np.array(out).T


def tanh(t: Array) -> Array:
    z, f = np.abs(t) >> 10, np.abs(t) & 1023
    h = ((-1316 * f) >> 10) + 7600
    h = ((h * f) >> 10) - 22670
    c = (((h * f) >> 10) + 32768) >> z
    return np.sign(t) * np.minimum(32767, ((32768 - c) * 2**15 + ((32768 + c) >> 1)) // (32768 + c))


class Classifier:
    """A sequence classifier of MegatronBert or of I-BERT, of 8 bits throughout.

    Args:
        directory: with config.json, model.safetensors and quantization.json.
    """

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        quantization = json.loads((directory / "quantization.json").read_text())
        assert quantization["version"] == 2
        self.ranges = quantization["ranges"]
        self.post = config["model_type"] == "ibert"
        self.prefix = "ibert" if self.post else "bert"
        self.weights = load_file(directory / "model.safetensors")
        self.heads, self.eps = config["num_attention_heads"], config["layer_norm_eps"]
        self.layers = config["num_hidden_layers"]
        self.first = config["pad_token_id"] + 1 if self.post else 0

    def logits(self, ids: Array) -> Array:
        """Integers of scale 2^-12 of one sequence without padding."""
        x = self.embedded(ids)
        for number in range(self.layers):
            x, _ = self.layer(number).run(x)
        if not self.post:
            at = "encoder.final_norm.ranges"
            integers = reference.read(x, self.k(f"{at}.input"))
            x = self.norm(f"{self.prefix}.encoder.ln", integers, f"{at}.input", f"{at}.output")
        # Owner of the ranges in quantization.json -> that of the weights.
        pooler, classifier = (
            {"classifier.dense": "classifier.dense", "classifier.out_proj": "classifier.out_proj"}
            if self.post
            else {"pair_head.pooler": "bert.pooler.dense", "classifier": "classifier"}
        ).items()
        acc, s = self.dense(x[:1], *pooler)
        t = np.clip(reference.rq_columns(acc, s * (2**10 * 2 * math.log2(math.e)), 0), -16384, 16384)
        acc, s = self.dense(tanh(t) * 2.0**-15, *classifier)
        return wide(acc, s * 2.0**12)

    def dense(self, x: Array, name: str, owner: str) -> tuple[Array, Array]:
        scale = self.ranges[f"{name}.ranges.input"] / 127
        x = reference.read8(x, scale)
        return reference.linear(x, scale, self.weights[f"{owner}.weight"], self.weights[f"{owner}.bias"])

    def k(self, name: str) -> int:
        return math.floor(math.log2(16383 / self.ranges[name]))

    def norm(self, owner: str, x: Array, source: str, result: str) -> Array:
        gain, offset = self.weights[f"{owner}.weight"], self.weights[f"{owner}.bias"]
        k = self.k(result)
        return reference.layer_norm(x, self.k(source), gain, offset, self.eps, 2.0**-k, 32767) * 2.0**-k

    def embedded(self, ids: Array) -> Array:
        at = f"{self.prefix}.embeddings"
        summed = f"embeddings.ranges.{'sum' if self.post else 'output'}"
        k = self.k(summed)
        total = reference.words(self.weights[f"{at}.word_embeddings.weight"][ids], k, 32767)
        places = self.first + np.arange(len(ids))
        for table, rows in (("position", places), ("token_type", np.zeros(len(ids), dtype=int))):
            total = total + reference.read(self.weights[f"{at}.{table}_embeddings.weight"][rows].astype(np.float64), k)
        total = np.clip(total, -32767, 32767)
        if not self.post:
            return total * 2.0**-k
        return self.norm(f"{at}.LayerNorm", total, summed, "embeddings.ranges.output")

    def layer(self, number: int) -> reference.Layer:
        at = f"{self.prefix}.encoder.layer.{number}"
        norms = ("attention.output.LayerNorm", "output.LayerNorm") if self.post else ("attention.ln", "ln")
        owners = {
            "attention_norm": norms[0],
            "mlp_norm": norms[1],
            "attention.output": "attention.output.dense",
            "mlp.intermediate": "intermediate.dense",
            "mlp.output": "output.dense",
        }
        found = {
            f"{ours}.{kind}": self.weights[f"{at}.{theirs}.{kind}"]
            for ours, theirs in owners.items()
            for kind in ("weight", "bias")
        }
        for kind in ("weight", "bias"):  # head by head: the query's rows, the key's, the value's
            parts = [self.weights[f"{at}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            by_head = [np.split(part, self.heads) for part in parts]
            fused = [part[head] for head in range(self.heads) for part in by_head]
            found[f"attention.query_key_value.{kind}"] = np.concatenate(fused)
        start = f"encoder.layers.{number}.ranges."
        ranges = {name.removeprefix(start): value for name, value in self.ranges.items() if name.startswith(start)}
        return reference.Layer(found, ranges, self.heads, self.eps, self.post)
