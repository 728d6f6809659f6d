# SPDX-License-Identifier: Apache-2.0
"""Fuzz the checkpoint readers: broken and hostile files end in a clear error, never in a traceback or executed code.

    python -m tools.fuzz_checkpoints --cases 5000 --seed 1

A small model is written in every format; each case breaks one of them in one way and reads it to the last tensor. A
case may end in success (a flipped bit of a weight is still a weight) or in a UserError of one sentence. Everything else
(another exception, a case that takes longer than ``--seconds``, a file that a pickle managed to create) is a failure,
and the broken checkpoint is kept under ``--keep``.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_bert.convert.conversion import convert
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.state import CanonicalState, SourceFacts, StateTensor, pretraining_tensors
from megatron_bert.ending import command
from megatron_bert.model.configuration import MegatronBertConfig
from tools.fuzzing import break_files, case_outcome, fuzz_parser, in_words, inject, read_back, run_cases


def make_corpus(folder: Path) -> list[Path]:
    """A tiny model in every format and container; the folder must be empty."""
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=6,
        layer_norm_eps=1e-5,
    )
    state = CanonicalState(
        config=config,
        facts=SourceFacts(format="native", variant="made", files=0, stored_rows=config.vocab_size),
        tensors={n: StateTensor.held(torch.randn(shape), n) for n, shape in pretraining_tensors(config).items()},
    )
    return [_write(state, folder / name, to, options) for name, to, options in _CORPUS] + _rewritten(folder)


_CORPUS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("native", "native", {}),
    ("huggingface", "huggingface", {}),
    ("huggingface_sharded", "huggingface", {"max_shard_bytes": 3000}),
    ("megatron", "megatron", {"tensor": 2, "pipeline": 2}),
    ("megatron_v0", "megatron", {"checkpoint_version": 0.0}),
    ("core", "megatron-core", {"norms": "fused", "tensor": 2}),
)


def _write(state: CanonicalState, target: Path, to: str, options: dict[str, Any]) -> Path:
    target.mkdir(parents=True)
    FORMATS[to].write(state, target, WriteOptions(**options))
    return target


def _rewritten(folder: Path) -> list[Path]:
    """The same again in containers that the converter reads but does not write."""
    shard = folder / "megatron_v0/release/mp_rank_00/model_optim_rng.pt"
    content = read_back(shard)
    stream = folder / "stream.pt"
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    archive = folder / "archive.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(stream, "release/mp_rank_00/model_optim_rng.pt")
    plain = folder / "huggingface_bin"
    plain.mkdir()
    shutil.copy(folder / "huggingface/config.json", plain)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "huggingface/model.safetensors"), plain / "pytorch_model.bin")
    return [stream, archive, plain]


def read_to_the_end(place: Path, scratch: Path | None = None) -> None:
    """Open a checkpoint and read every tensor; convert it too, where a folder for the result is given."""
    if scratch is not None:
        convert(place, scratch / "result", to="native", progress=False)
        return
    with open_checkpoint(place) as state:
        for tensor in (*state.values(), *state.optimizer.values()):
            tensor.load()


def run_case(original: Path, folder: Path, seed: int, seconds: int = 20) -> tuple[str, str]:
    """Break a copy of a checkpoint in an empty folder, as a seed decides, and read it.

    Returns:
        The outcome (``fine``, ``refused`` or a failure) and what was done to the files.
    """
    chance = random.Random(seed)
    place, canary = folder / original.name, folder / "canary"
    (shutil.copytree if original.is_dir() else shutil.copy)(original, place)
    what = inject(place, chance, canary) if chance.random() < 0.25 else break_files(place, chance)
    scratch = folder if chance.random() < 0.1 else None
    outcome = case_outcome(lambda: read_to_the_end(place, scratch), canary, seconds)
    if outcome != "fine" and (folder / "result").exists():
        outcome = f"a failed conversion left its result ({outcome})"
    return outcome, what


@command("fuzz_checkpoints")
def main(arguments: list[str] | None = None) -> int:
    """Run many cases; 1 if one of them failed."""
    description = "Fuzz the checkpoint readers with broken and hostile files."
    parser = fuzz_parser(description, 8.0, "limit of address space; 0 sets none")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where failing checkpoints are kept")
    options = parser.parse_args(arguments)
    if options.memory:
        limit = int(options.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes = run_cases(options, make_corpus, run_case, options.keep)
    print(in_words(outcomes))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
