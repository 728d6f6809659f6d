# SPDX-License-Identifier: Apache-2.0
"""Training runs of a small model at many layouts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.data.corpora import open_corpus
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.replica_check import check_replicas
from megatron_bert.training.trainer import Trainer
from parallel.mesh import DATA_AXES, ParallelMesh, Sharding
from parallel.process_group import World
from parallel.recompute import Recompute
from tests.megatron_bert.data.support import numbered_tokenizer, random_corpus
from tests.worlds import CPU, gathered_all, preload

preload(__name__)

#: Samples per step: the numbers of data ranks of all cases divide it.
BATCH = 24
LENGTH = 12
#: The second sees what the first did to weights and moments.
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout, with the other settings that may not change what is computed."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    sharding: Sharding = "none"
    microbatches: int = 1
    packed: bool = False
    by_hand: bool = False
    depth: int = 5
    compute: str = "float32"
    optimizer: str = "adamw"

    def __str__(self) -> str:
        """The test's id."""
        parts = [f"t{self.tensor}p{self.pipeline}d{self.data}", self.schedule, f"m{self.microbatches}"]
        if self.chunks > 1:
            parts.append(f"v{self.chunks}")
        if self.sequence:
            parts.append("sequence")
        if self.recompute != "none":
            parts.append(self.recompute)
        if self.sharding != "none":
            parts.append(f"shard_{self.sharding}")
        if self.packed:
            parts.append("packed")
        if self.by_hand:
            parts.append("by_hand")
        if self.compute != "float32":
            parts.append(self.compute)
        if self.optimizer != "adamw":
            parts.append(self.optimizer)
        return "-".join(parts)

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def stages(self) -> int:
        return self.pipeline * self.chunks

    @property
    def plain(self) -> Case:
        """The same model on one process, all samples of a step in one microbatch."""
        return Case(depth=self.depth, packed=self.packed, optimizer=self.optimizer)

    def stage_layers(self) -> list[int] | None:
        """As uneven as can be: all spare layers on the last stage, which has the head already."""
        return [1] * (self.stages - 1) + [self.depth - self.stages + 1] if self.by_hand else None

    def settings(self, folder: Path) -> Settings:
        """Of a run in a folder made by :func:`make_data`."""
        return Settings.model_validate(
            {
                "model": {
                    "hidden_size": 48,
                    "num_hidden_layers": self.depth,
                    "num_attention_heads": 24,
                    "intermediate_size": 96,
                    "max_position_embeddings": LENGTH,
                    "initializer_range": 0.05,
                    "vocab_size_multiple": 24,
                },
                "tokenizer": {"path": folder / "vocab.txt"},
                "data": {
                    "train": [{"prefix": folder / "corpus"}],
                    "split": "80,20,0",
                    "seq_length": LENGTH,
                    "short_sequence_probability": 0.5,
                    "packed": self.packed,
                    "workers": 0,
                    "cache_dir": folder / "cache",
                },
                "parallel": {
                    "tensor": self.tensor,
                    "pipeline": self.pipeline,
                    "data": self.data,
                    "schedule": self.schedule,
                    "virtual_stages": self.chunks if self.chunks > 1 else None,
                    "stage_layers": self.stage_layers(),
                    "sequence": self.sequence,
                    "sharding": self.sharding,
                    "shard_size": 2 if self.sharding == "hybrid" else None,
                },
                # Adam divides a gradient by its own size: the smallest, which are all rounding, would move weights as
                # far as any other. This eps, about the size of a typical gradient here, keeps the update smooth.
                "optimizer": {"name": self.optimizer, "eps": 1e-3, "clip_grad_norm": 0.5},
                "learning_rate": {"peak": 1e-2, "schedule": "constant"},
                "precision": {"compute": self.compute},
                "training": {
                    "run_dir": folder / "runs" / str(self),
                    "steps": STEPS,
                    "global_batch_size": BATCH,
                    "micro_batch_size": BATCH // (self.data * self.microbatches),
                    "recompute": self.recompute,
                    "device": "cpu",
                    "evaluate_batches": 1,
                },
                "checkpoint": {"asynchronous": False, "keep": 0},
            }
        )


def make_data(folder: Path) -> None:
    """A vocabulary, a corpus of random words, and its sample indices, which ranks then only read."""
    tokenizer = numbered_tokenizer(folder, 90)
    random_corpus(folder / "corpus", seed=5, documents=60, vocab_size=90)
    for part in ("train", "valid"):
        open_corpus(Case().settings(folder), tokenizer, part)


@dataclass
class Outcome:
    """What a rank saw of a run.

    Attributes:
        losses: masked-token and pair loss of each step.
        norms: of the gradients.
        scores: of the evaluation after the last step.
        initial: global name -> digest of the whole initial tensor, of the rank's stages.
        weights: global name -> whole final tensor, of the rank's stages.
        copies: the same of the last stage's copy of the word embeddings.
    """

    losses: list[list[float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)


def make_trainer(
    case: Case, folder: Path, resume_from: Path | None = None, run_dir: Path | None = None, trace: bool = False
) -> Trainer:
    """A trainer over the world this is called in."""
    settings = case.settings(folder)
    if run_dir is not None:
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"run_dir": run_dir})})
    settings = settings.model_copy(update={"logging": settings.logging.model_copy(update={"trace": trace})})
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = ParallelMesh(check_settings(settings, size), CPU)
    world = World(rank=rank, size=size, local_rank=rank, device=CPU)
    objective = Pretraining(settings, load_tokenizer(settings.tokenizer.path))
    return Trainer(settings, objective, mesh, world, resume_from)


def train(trainer: Trainer, steps: int, outcome: Outcome) -> Any:
    """Take steps and note what they did; returns the sums of the last."""
    batches = trainer.objective.training_batches(trainer.mesh, trainer.consumed_samples, steps, CPU)
    sums = None
    for _ in range(steps):
        sums = trainer.train_step([next(batches) for _ in range(trainer.engine.schedule.microbatches)])
        losses = trainer.mesh.all_reduce(sums.losses.clone(), (*DATA_AXES, "pipeline")) / sums.counts
        outcome.losses.append(losses.tolist())
        outcome.norms.append(sums.grad_norm.item())
    return sums


def run_case(case: Case, folder: Path) -> Outcome:
    """A run from the first step to the last, and an evaluation."""
    trainer = make_trainer(case, folder)
    outcome = Outcome()
    outcome.initial = {
        name: _digest(whole) for name, whole in _whole(trainer, {**trainer.parameters, **trainer.copies}).items()
    }
    train(trainer, STEPS, outcome)
    check_replicas(trainer)
    note_weights(trainer, outcome)
    outcome.scores = trainer.evaluate()
    return outcome


def note_weights(trainer: Trainer, outcome: Outcome) -> None:
    """Gather the weights; ranks that would only repeat them return none."""
    weights, copies = _whole(trainer, trainer.parameters), _whole(trainer, trainer.copies)
    coordinate = trainer.mesh.coordinate
    if all(coordinate[axis] == 0 for axis in ("tensor", *DATA_AXES)):
        outcome.weights, outcome.copies = weights, copies


def _whole(trainer: Trainer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    weights = {name: trainer.optimizer.weights(parameter) for name, parameter in parameters.items()}
    return gathered_all(weights, trainer.mesh)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def joined(outcomes: list[Outcome]) -> Outcome:
    """One outcome of those of all ranks, which agree on what they share."""
    first = outcomes[0]
    result = Outcome(first.losses, first.norms, first.scores)
    for outcome in outcomes:
        assert (outcome.losses, outcome.norms, outcome.scores) == (first.losses, first.norms, first.scores)
        for name, digest in outcome.initial.items():
            assert result.initial.setdefault(name, digest) == digest, name
        result.weights |= outcome.weights
        result.copies |= outcome.copies
    return result


def largest_difference(actual: Outcome, expected: Outcome) -> float:
    """The largest relative difference of losses, gradient norms, scores and weights.

    Weights are compared relative to the largest of their tensor.
    """
    assert actual.weights.keys() == expected.weights.keys()
    assert actual.scores.keys() == expected.scores.keys()
    pairs = [
        (actual.losses, expected.losses),
        (actual.norms, expected.norms),
        (list(actual.scores.values()), list(expected.scores.values())),
    ]
    worst = 0.0
    for mine, theirs in pairs:
        given, wanted = torch.tensor(mine, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
        assert given.shape == wanted.shape
        if len(wanted):
            worst = max(worst, ((given - wanted).abs() / wanted.abs().clamp(min=1e-30)).max().item())
    for name, weight in expected.weights.items():
        worst = max(worst, ((actual.weights[name] - weight).abs().max() / weight.abs().max()).item())
    return worst
