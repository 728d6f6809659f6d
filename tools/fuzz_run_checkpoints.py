# SPDX-License-Identifier: Apache-2.0
"""Fuzz the checkpoints of runs: each load gives what was saved, or refuses in a sentence.

    python -m tools.fuzz_run_checkpoints --cases 10000 --seed 1

A small checkpoint is written as a run writes it. Each case breaks a copy in one way (bytes, names, sizes, JSON, the
pickle of the metadata, a block of a tensor) and loads it as a run that resumes does. In a quarter of the cases the
checksums are made to fit afterwards, as somebody would do who means harm; such a load may give other weights. All else
is a failure: another value, another exception, code that was run, a case that takes longer than ``--seconds``, and more
memory than ``--memory``.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_bert.ending import command
from megatron_bert.training.run import RUN_STATE
from parallel.checkpoint import check_checkpoint, read_state
from parallel.checkpoint_reader import load_tensors
from parallel.checkpoint_writer import CheckpointWriter
from parallel.errors import UserError
from parallel.manifest import write_manifest
from parallel.process_group import process_group
from tools.fuzzing import Mutation, break_files, case_outcome, fuzz_parser, in_words, inject, run_cases

_STATE = {"step": 7, "consumed_samples": 56, "optimizer": {"steps": 7}, "loss_scale": {"value": 1.0}, "tokenizer": "a"}


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint of a few tensors in a folder."""
    generator = torch.Generator().manual_seed(1)
    with process_group("cpu"):
        writer = CheckpointWriter(folder, keep=0, asynchronous=False)
        return writer.save(7, {name: torch.randn(size, generator=generator) for name, size in _SIZES.items()}, _STATE)


_SIZES = {"model.weight": (5, 4), "model.bias": (6,), "optimizer.exp_avg.weight": (5, 4), "model.scalar": ()}


def load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state and the tensors, as a run that resumes reads them.

    Raises:
        UserError: the checkpoint is damaged.
    """
    check_checkpoint(path)
    tensors = {name: torch.full(size, torch.nan) for name, size in _SIZES.items()}
    load_tensors(path, tensors)
    state = read_state(path)
    if missing := [name for name in RUN_STATE if name not in state]:
        raise UserError(f"{path} holds no {missing[0]}: it is not a checkpoint of a run")
    return state, tensors


def run_case(original: Path, folder: Path, seed: int, seconds: int = 20) -> tuple[str, str]:
    """Break a copy of a checkpoint in an empty folder, as a seed decides, and load it.

    Returns:
        The outcome (``fine``, ``refused`` or a failure) and what was done to the files.
    """
    chance = random.Random(seed)
    place, canary = folder / original.name, folder / "canary"
    shutil.copytree(original, place)
    mutations: list[Mutation] = [break_files, break_files, break_files, _rename]
    what = inject(place, chance, canary) if chance.random() < 0.25 else chance.choice(mutations)(place, chance)
    forged = chance.random() < 0.25
    if forged:
        write_manifest(place)
        what += ", checksums made to fit"
    return case_outcome(lambda: _compare(place, original, forged), canary, seconds), what


def _compare(place: Path, original: Path, forged: bool) -> None:
    state, tensors = load(place)
    expected_state, expected = load(original)
    if not forged:
        assert state == expected_state, "the state is another one"
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), f"{name} is another tensor"


def _rename(place: Path, chance: random.Random) -> str:
    path = chance.choice([path for path in place.iterdir() if path.is_file()])
    name = chance.choice((f"{path.name}x", f".{path.name}", "__1_0.distcp", "state.json", "n" * 200))
    path.rename(path.with_name(name))
    return f"{path.name} is called {name}"


@command("fuzz_run_checkpoints")
def main(arguments: list[str] | None = None) -> int:
    """Run many cases; 1 if one of them failed."""
    options = fuzz_parser("Fuzz the checkpoints of runs.", 2.0, "most memory that may be resident").parse_args(
        arguments
    )
    outcomes = run_cases(options, lambda folder: [make_checkpoint(folder)], run_case)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{in_words(outcomes)}; peak {peak:.2f} GB")
    return 1 if outcomes["failed"] or peak > options.memory else 0


if __name__ == "__main__":
    sys.exit(main())
