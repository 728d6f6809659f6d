# SPDX-License-Identifier: Apache-2.0
"""The forward pass of training is the specification: every integer equals that of a literal second implementation."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import torch

from megatron_bert.ibert import named_ranges, quantizers
from tests.megatron_bert.ibert import reference
from tests.megatron_bert.ibert.support import padded, quantized_stack, sequences, tensors_of


def _arrays(stack: torch.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    named = {n.removeprefix(prefix): p.detach().numpy() for n, p in stack.named_parameters() if n.startswith(prefix)}
    assert named
    return named


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("narrow", [1.0, 0.3])
def test_layers(placement, narrow):
    """``narrow`` ranges make every clamp count."""
    stack = quantized_stack(placement, layers=2)
    for value in named_ranges(stack).values():
        value.mul_(narrow)
    if placement == "pre":  # read at another scale than it was written at
        named_ranges(stack)["encoder.layers.1.ranges.input.range"].mul_(4)
    (ids,), longest = sequences(37)
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        found = tensors_of(stack, lambda: stack(*padded([ids], longest)))
    targets = {name: quantizer.target() for name, quantizer in quantizers(stack)}
    start = "embeddings.ranges.output"
    stream = found[start].numpy() * targets[start].unit
    clamped = 0
    for number in (0, 1):
        prefix = f"encoder.layers.{number}."
        ranges = {
            name.removeprefix(f"{prefix}ranges.").removesuffix(".range"): float(value)
            for name, value in named_ranges(stack).items()
            if name.startswith(prefix)
        }
        layer = reference.Layer(_arrays(stack, prefix), ranges, heads=4, eps=1e-5, post=placement == "post")
        stream, integers = layer.run(stream)
        assert len(integers) == (9 if placement == "pre" else 11)
        for name, expected in integers.items():
            ours = found[f"{prefix}ranges.{name}"].numpy().reshape(expected.shape)
            assert np.array_equal(ours, expected), (number, name)
            clamped += int((np.abs(expected) == targets[f"{prefix}ranges.{name}"].high).sum())
    assert clamped > (2000 if narrow < 1 else 0)


def test_embeddings_and_final_norm():
    stack = quantized_stack("pre", layers=1)
    (ids,), longest = sequences(30)
    tokens, positions, layout = padded([ids], longest)
    with torch.no_grad():
        found = tensors_of(stack, lambda: stack(tokens, positions, layout))
    ranges = {name.removesuffix(".range"): float(value) for name, value in named_ranges(stack).items()}
    k = int(np.floor(np.log2(16383 / ranges["embeddings.ranges.output"])))
    p = _arrays(stack, "")
    tables = [
        p[f"embeddings.{name}_embeddings.weight"][rows]
        for name, rows in (("position", np.arange(30)), ("token_type", np.zeros(30, dtype=int)))
    ]
    total = reference.words(p["embeddings.word_embeddings.weight"][ids.numpy()], k, 32767)
    total += sum(reference.read(table.astype(np.float64), k) for table in tables)
    assert np.array_equal(found["embeddings.ranges.output"].numpy(), np.clip(total, -32767, 32767))
    out = "encoder.layers.0.ranges.output"
    source, result = (f"encoder.final_norm.ranges.{name}" for name in ("input", "output"))
    exponents = [int(np.floor(np.log2(16383 / ranges[name]))) for name in (source, result)]
    last = int(np.floor(np.log2(16383 / ranges[out])))
    x = reference.read(found[out].numpy() * 2.0**-last, exponents[0])
    expected = reference.layer_norm(
        x,
        exponents[0],
        p["encoder.final_norm.weight"],
        p["encoder.final_norm.bias"],
        1e-5,
        2.0 ** -exponents[1],
        32767,
    )
    assert np.array_equal(found[result].numpy(), expected)


def test_the_document_is_packaged_and_states_the_constants():
    text = files("megatron_bert.ibert").joinpath("specification.md").read_text(encoding="utf-8")
    for constant in (
        "-1316",
        "22670",
        "7600",
        "-15097",
        "29496",
        "9868",
        "1655",
        "-1305",
        "7562",
        "22579",
        "32640",
        "0.17",
    ):
        assert constant in text
