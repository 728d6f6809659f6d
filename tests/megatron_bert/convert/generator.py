# SPDX-License-Identifier: Apache-2.0
"""Synthetic Megatron checkpoints of every era, and a forward pass written from their layout alone.

Nothing here uses the converter: weights are drawn as a plain dictionary in Megatron's terms (separate query, key and
value of each head), written as Megatron's training code of each era would have, and run in float64. What the converter
makes of the files must give the same logits.
"""

from __future__ import annotations

import argparse
import math
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ERAS = ("transformer", "encoder", "norm", "core", "core-fused")


@dataclass(frozen=True)
class Sizes:
    """A tiny model: 4 layers of 4 heads, 90 words in 128 rows."""

    layers: int = 4
    hidden: int = 16
    heads: int = 4
    ffn: int = 32
    positions: int = 12
    words: int = 90
    types: int = 2
    binary_head: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def rows(self, tensor: int) -> int:
        return -(-self.words // (128 * tensor)) * 128 * tensor


def draw(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Weights large enough that every part of the model matters. Query, key, value: ``[heads, head_dim, ..]``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    def norm() -> dict[str, Tensor]:
        return {"weight": 1 + normal(sizes.hidden), "bias": normal(sizes.hidden)}

    def linear(rows: int, columns: int) -> dict[str, Tensor]:
        return {"weight": normal(rows, columns), "bias": normal(rows)}

    def projection() -> dict[str, Tensor]:
        return {
            "weight": normal(sizes.heads, sizes.head_dim, sizes.hidden),
            "bias": normal(sizes.heads, sizes.head_dim),
        }

    h = sizes.hidden
    weights: dict[str, Any] = {
        "word": normal(sizes.words, h),
        "position": normal(sizes.positions, h),
        "layers": [
            {
                "norm1": norm(),
                **{name: projection() for name in ("query", "key", "value")},
                "dense": linear(h, h),
                "norm2": norm(),
                "up": linear(sizes.ffn, h),
                "down": linear(h, sizes.ffn),
            }
            for _ in range(sizes.layers)
        ],
        "final": norm(),
        "lm_dense": linear(h, h),
        "lm_norm": norm(),
        "lm_bias": normal(sizes.words),
    }
    if sizes.binary_head:
        weights |= {"type": normal(sizes.types, h), "pooler": linear(h, h), "binary": linear(2, h)}
    return weights


# ---------------------------------------------------------------- the truth


@torch.no_grad()
def forward(
    weights: dict[str, Any], tokens: Tensor, types: Tensor, mask: Tensor, *, eps: float = 1e-5, gelu: str = "erf"
) -> tuple[Tensor, Tensor | None]:
    """Word logits ``[B, S, words]`` and pair logits ``[B, 2]`` in float64, by loops over sequences and heads.

    Args:
        tokens, types: int64 ``[B, S]``.
        mask: bool ``[B, S]``, true for real tokens.
    """

    def norm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        variance = (centered * centered).mean(-1, keepdim=True)
        return centered / (variance + eps).sqrt() * p["weight"].double() + p["bias"].double()

    def linear(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return x @ p["weight"].double().T + p["bias"].double()

    def activation(x: Tensor) -> Tensor:
        if gelu == "erf":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    words, pairs = [], []
    for ids, kinds, real in zip(tokens, types, mask):
        x = weights["word"].double()[ids] + weights["position"].double()[: len(ids)]
        if "type" in weights:
            x = x + weights["type"].double()[kinds]
        for layer in weights["layers"]:
            y = norm(x, layer["norm1"])
            heads = []
            for head in range(layer["query"]["weight"].shape[0]):
                q, k, v = (
                    y @ layer[name]["weight"][head].double().T + layer[name]["bias"][head].double()
                    for name in ("query", "key", "value")
                )
                scores = q @ k.T / math.sqrt(q.shape[1])
                scores[:, ~real] = -1e9
                heads.append(scores.softmax(-1) @ v)
            x = x + linear(torch.cat(heads, -1), layer["dense"])
            y = norm(x, layer["norm2"])
            x = x + linear(activation(linear(y, layer["up"])), layer["down"])
        x = norm(x, weights["final"])
        features = norm(activation(linear(x, weights["lm_dense"])), weights["lm_norm"])
        words.append(features @ weights["word"].double().T + weights["lm_bias"].double())
        if "pooler" in weights:
            pairs.append(linear(torch.tanh(linear(x[0], weights["pooler"])), weights["binary"]))
    return torch.stack(words), torch.stack(pairs) if pairs else None


# ---------------------------------------------------------------- files


def fused_rows(layer: dict[str, Any], kind: str, heads: slice, version: float) -> Tensor:
    """Fused query, key and value of some heads in the row order of a checkpoint version, element by element."""
    parts = [layer[name][kind][heads] for name in ("query", "key", "value")]
    count, dim = parts[0].shape[:2]
    rows = []
    if version == 0:
        rows = [part[head, d] for part in parts for head in range(count) for d in range(dim)]
    elif version == 1:
        rows = [part[head, d] for head in range(count) for d in range(dim) for part in parts]
    else:
        rows = [part[head, d] for head in range(count) for part in parts for d in range(dim)]
    return torch.stack(rows)


def shard(
    weights: dict[str, Any],
    sizes: Sizes,
    era: str,
    version: float,
    layers: range,
    *,
    rank: int,
    tensor: int,
    first: bool,
    last: bool,
    copy: bool,
) -> dict[str, Any]:
    """The ``model`` dictionary of one rank and chunk of a stage."""
    rows = sizes.rows(tensor)
    pad = torch.full((rows - sizes.words, sizes.hidden), 0.01, dtype=weights["word"].dtype)
    word = torch.cat((weights["word"], pad)).chunk(tensor)[rank].clone()
    bias = torch.cat((weights["lm_bias"], pad[:, 0])).chunk(tensor)[rank].clone()
    share = sizes.heads // tensor
    heads = slice(rank * share, (rank + 1) * share)

    flat: dict[str, Tensor] = OrderedDict()
    for local, number in enumerate(layers):
        layer = weights["layers"][number]
        for kind in ("weight", "bias"):
            flat[f"{local}.norm1.{kind}"] = layer["norm1"][kind]
            flat[f"{local}.qkv.{kind}"] = fused_rows(layer, kind, heads, version)
            flat[f"{local}.norm2.{kind}"] = layer["norm2"][kind]
            flat[f"{local}.up.{kind}"] = layer["up"][kind].chunk(tensor)[rank].clone()
        flat[f"{local}.dense.weight"] = layer["dense"]["weight"].chunk(tensor, 1)[rank].clone()
        flat[f"{local}.dense.bias"] = layer["dense"]["bias"]
        flat[f"{local}.down.weight"] = layer["down"]["weight"].chunk(tensor, 1)[rank].clone()
        flat[f"{local}.down.bias"] = layer["down"]["bias"]
    if era.startswith("core"):
        return _core(weights, flat, era == "core-fused", word, bias, first=first, last=last, copy=copy)
    return _legacy(weights, flat, era, word, bias, first=first, last=last, copy=copy)


def _legacy(
    weights: dict[str, Any],
    flat: dict[str, Tensor],
    era: str,
    word: Tensor,
    bias: Tensor,
    *,
    first: bool,
    last: bool,
    copy: bool,
) -> dict[str, Any]:
    stack = "transformer" if era == "transformer" else "encoder"
    attention = "attention" if era == "transformer" else "self_attention"
    norms = ("input_norm", "post_attention_norm", "final_norm", "norm")
    if era != "norm":
        norms = ("input_layernorm", "post_attention_layernorm", "final_layernorm", "layernorm")
    names = {
        "norm1": norms[0],
        "qkv": f"{attention}.query_key_value",
        "dense": f"{attention}.dense",
        "norm2": norms[1],
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    layers = OrderedDict()
    for key, tensor in flat.items():
        number, part, kind = key.split(".")
        layers[f"layers.{number}.{names[part]}.{kind}"] = tensor
    language: dict[str, Any] = {}
    model: dict[str, Any] = {"language_model": language}
    if first:
        language["embedding"] = {
            "word_embeddings": OrderedDict(weight=word),
            "position_embeddings": OrderedDict(weight=weights["position"]),
        }
        if "type" in weights:
            language["embedding"]["tokentype_embeddings"] = OrderedDict(weight=weights["type"])
    if last:
        for kind in ("weight", "bias"):
            layers[f"{norms[2]}.{kind}"] = weights["final"][kind]
        head = model["lm_head"] = OrderedDict(bias=bias)
        for kind in ("weight", "bias"):
            head[f"dense.{kind}"] = weights["lm_dense"][kind]
            head[f"{norms[3]}.{kind}"] = weights["lm_norm"][kind]
        if "pooler" in weights:
            language["pooler"] = OrderedDict({f"dense.{kind}": t for kind, t in weights["pooler"].items()})
            model["binary_head"] = OrderedDict(weights["binary"])
        if copy:
            model["word_embeddings_for_head"] = OrderedDict(weight=word.clone())
    language[stack] = layers
    return model


def _core(
    weights: dict[str, Any],
    flat: dict[str, Tensor],
    fused: bool,
    word: Tensor,
    bias: Tensor,
    *,
    first: bool,
    last: bool,
    copy: bool,
) -> dict[str, Any]:
    names = {
        "norm1": "input_layernorm.",
        "qkv": "self_attention.linear_qkv.",
        "dense": "self_attention.linear_proj.",
        "norm2": "pre_mlp_layernorm.",
        "up": "mlp.linear_fc1.",
        "down": "mlp.linear_fc2.",
    }
    if fused:
        names |= {"norm1": "self_attention.linear_qkv.layer_norm_", "norm2": "mlp.linear_fc1.layer_norm_"}
    model: dict[str, Any] = OrderedDict()
    if first:
        model["embedding.word_embeddings.weight"] = word
        model["embedding.position_embeddings.weight"] = weights["position"]
        if "type" in weights:
            model["embedding.tokentype_embeddings.weight"] = weights["type"]
    for key, tensor in flat.items():
        number, part, kind = key.split(".")
        model[f"encoder.layers.{number}.{names[part]}{kind}"] = tensor
        if fused and part == "qkv":
            model[f"encoder.layers.{number}.self_attention.linear_qkv._extra_state"] = None
    if last:
        for kind in ("weight", "bias"):
            model[f"encoder.final_layernorm.{kind}"] = weights["final"][kind]
            model[f"lm_head.dense.{kind}"] = weights["lm_dense"][kind]
            model[f"lm_head.layer_norm.{kind}"] = weights["lm_norm"][kind]
            if "pooler" in weights:
                model[f"pooler.dense.{kind}"] = weights["pooler"][kind]
                model[f"binary_head.{kind}"] = weights["binary"][kind]
        model["output_layer.bias"] = bias
        if copy:
            model["output_layer.weight"] = word.clone()
    return model


def arguments(sizes: Sizes, tensor: int, pipeline: int, *, eps: float = 1e-5, tanh: bool = False) -> argparse.Namespace:
    """The part of a run's arguments that matters."""
    return argparse.Namespace(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        layernorm_epsilon=eps,
        openai_gelu=tanh,
        padded_vocab_size=sizes.rows(tensor),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        params_dtype=torch.float16,
        lr=np.float64(1e-4),
        fp16=True,
    )


def write_checkpoint(
    folder: Path,
    weights: dict[str, Any],
    sizes: Sizes,
    *,
    era: str = "encoder",
    version: float | None = 3.0,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    iteration: int | None = None,
    args: argparse.Namespace | bool | None = True,
    extras: bool = False,
    stream: bool = False,
    tracker: bool = True,
) -> Path:
    """Write a checkpoint as Megatron does; ``stream`` is the container of torch before 1.6."""
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    if args is True:
        args = arguments(sizes, tensor, pipeline)
    share = sizes.layers // (pipeline * virtual)
    for stage in range(pipeline):
        for rank in range(tensor):
            chunks = []
            for chunk in range(virtual):
                start = (chunk * pipeline + stage) * share
                layers = range(start, start + share)
                last = layers.stop == sizes.layers
                chunks.append(
                    shard(
                        weights,
                        sizes,
                        era,
                        version or 0.0,
                        layers,
                        rank=rank,
                        tensor=tensor,
                        first=start == 0,
                        last=last,
                        copy=last and pipeline > 1,
                    )
                )
            content: dict[str, Any] = {"iteration": iteration or 0}
            content |= {"model": chunks[0]} if virtual == 1 else {f"model{i}": c for i, c in enumerate(chunks)}
            if version is not None:
                content["checkpoint_version"] = version
            if args:
                content["args"] = args
            if extras:
                content |= _extras()
            place = folder / name / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            place.mkdir(parents=True)
            torch.save(content, place / "model_optim_rng.pt", _use_new_zipfile_serialization=not stream)
    if tracker:
        text = "release" if iteration is None else str(iteration)
        (folder / "latest_checkpointed_iteration.txt").write_text(text)
    return folder


def _extras() -> dict[str, Any]:
    import random

    return {
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "step": np.int64(5)},
        "lr_scheduler": {"start_lr": 1e-4, "num_iters": 3},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }


def write_zip(archive: Path, folder: Path, *, compressed: bool = True) -> Path:
    """Pack a checkpoint folder as NGC does."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(archive, "w", kind) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())
    return archive
