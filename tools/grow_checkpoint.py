# SPDX-License-Identifier: Apache-2.0
"""A wider and deeper encoder that starts from what a smaller one has learned.

The width, the heads and the intermediate size are doubled without changing what the model computes: every feature is
there twice, and the two copies share, unevenly and at random, the weights with which one was read before, so that they
learn different things (Chen et al., bert2BERT, arXiv 2110.07143). Layers may be repeated; copies of one layer share its
contribution evenly, which changes the result a little. Both directories are Hugging Face's::

    megatron-bert convert runs/small small --to huggingface
    python -m tools.grow_checkpoint small large --layers 0 1 1 2 2 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_bert import MegatronBertForPreTraining
from megatron_bert.ending import command
from parallel.errors import UserError

#: The least and the most of a weight that the first copy of a feature takes.
_SHARES = (0.2, 0.8)


def twice(features: Tensor) -> Tensor:
    """``[.., H]`` to ``[.., 2 H]``: every feature again."""
    return torch.cat((features, features), dim=-1)


def divided(weight: Tensor, generator: torch.Generator) -> Tensor:
    """``[out, H]`` to ``[out, 2 H]``: the weight of a feature divided between its two copies."""
    share = torch.empty(weight.shape).uniform_(*_SHARES, generator=generator)
    return torch.cat((weight * share, weight * (1 - share)), dim=1)


def grown(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """One parameter, by Hugging Face's name, at twice the width."""
    if name in ("cls.predictions.bias", "cls.seq_relationship.bias"):
        return weight
    if name == "cls.seq_relationship.weight":
        return divided(weight, generator)
    if "transform.LayerNorm" in name:
        return twice(weight) / 2  # words are read off by the embeddings, which are twice as wide
    if weight.dim() == 1 or "embeddings" in name:
        return twice(weight)
    return torch.cat((divided(weight, generator), divided(weight, generator)))


def grow(source: Path, target: Path, layers: list[int], seed: int = 0) -> None:
    """Write a model of twice the width.

    Args:
        source: Hugging Face directory of a MegatronBERT; heads that it lacks are initialized from scratch.
        layers: which layer of it each layer is made of.

    Raises:
        UserError: no such model, a layer that it does not have, or an output matrix of its own.
    """
    model = MegatronBertForPreTraining.from_pretrained(source)
    config = model.config
    if not layers or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise UserError(f"--layers is {layers}: give numbers of 0 to {config.num_hidden_layers - 1}")
    if not config.tie_word_embeddings or config.position_embedding_type != "absolute":
        raise UserError(f"{source} has an output matrix of its own or relative positions, which do not grow")
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=1 << 50)
        old = load_file(Path(folder) / "model.safetensors")
    new = {name: grown(name, weight, generator) for name, weight in old.items() if ".layer." not in name}
    for number, layer in enumerate(layers):
        start = f"bert.encoder.layer.{layer}."
        for name in filter(lambda name: name.startswith(start), old):
            part = 1 / layers.count(layer) if "output.dense" in name else 1.0
            new[f"bert.encoder.layer.{number}.{name.removeprefix(start)}"] = grown(name, old[name], generator) * part
    config.replaced(
        hidden_size=2 * config.hidden_size,
        num_attention_heads=2 * config.num_attention_heads,
        intermediate_size=2 * config.intermediate_size,
        num_hidden_layers=len(layers),
        architectures=["MegatronBertForPreTraining"],
    ).save_pretrained(target)
    save_file(new, target / "model.safetensors", metadata={"format": "pt"})


@command("grow_checkpoint")
def main(given: list[str] | None = None) -> int:
    """Grow the model of one directory into another; 0 on success, 2 for mistakes a user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face directory of the small model")
    parser.add_argument("target", type=Path, help="directory for the large one")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="the small model's layer for each layer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    grow(arguments.source, arguments.target, arguments.layers, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
