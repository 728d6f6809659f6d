# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert evaluate` and `predict`: what a fine-tuned model says of files, and of a stream."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from tqdm import tqdm

from megatron_bert.config_file import apply_override, validated
from megatron_bert.config_sections import TokenizerSettings
from megatron_bert.finetuning.arrivals import arriving
from megatron_bert.finetuning.results import RESULTS_FILE, as_line, write_split
from megatron_bert.finetuning.saved import SavedTask, load_task
from megatron_bert.finetuning.scoring import Scored, score_instances
from megatron_bert.tasks.rows import RowError, parse_object
from megatron_bert.tasks.stream import name_of
from megatron_bert.tasks.task import Example, Instance, Prediction, Task
from megatron_bert.training.staged_model import StagedModel
from parallel.errors import UserError
from parallel.mesh import ParallelLayout, ParallelMesh
from parallel.object_collectives import on_first_rank
from parallel.pipeline.engine import PipelineEngine
from parallel.pipeline.schedules import forward_only
from parallel.process_group import World, launched_world_size, process_group
from parallel.whole_files import write_json

#: Rows of a stream that are put in order of length together, in batches.
_BUFFERED_BATCHES = 32
#: A setting of each section that a user may give.
_EXAMPLES = {"data": "test=FILE", "task": "max_length=256", "tokenizer": "path=PATH"}


class Engine(NamedTuple):
    """What computes.

    Attributes:
        backend: ``torch``; ``integer``, the fastest engine of quantized models that runs here; or an engine's name.
        threads: of an engine; None leaves them to it.
    """

    backend: str = "torch"
    threads: int | None = None

    def device(self, asked: str) -> str:
        """The device to run on, given what was asked for.

        Raises:
            UserError: an engine cannot run there.
        """
        if self.backend == "torch":
            return asked
        if self.backend == "cuda":
            if asked == "cpu":
                raise UserError("--backend cuda computes on a GPU: leave --device cpu out")
            # Without a GPU there is Triton's interpreter, or the backend says what is missing.
            return "cuda" if torch.cuda.is_available() else "cpu"
        if asked == "cuda":
            other = ""
            if self.backend == "integer":
                other = ", or name the engine of GPUs, which has not run on one yet, by --backend cuda"
            raise UserError(f"--backend {self.backend} computes on the CPU: leave --device cuda out{other}")
        return "cpu"


class Scorer:
    """A saved model on this process's device, or on those of all data ranks.

    Args:
        world: the processes; all of them hold the whole model.
        batch_size: most instances of a forward pass.
        engine: what computes, and its threads: see :meth:`SavedTask.stage`.
    """

    def __init__(self, saved: SavedTask, world: World, batch_size: int, engine: Engine) -> None:
        self.saved, self.batch_size = saved, batch_size
        self.mesh = ParallelMesh(ParallelLayout(data=world.size), world.device)
        stage = saved.stage(*engine).to(world.device)
        self.model = StagedModel({0: stage}, None)
        self.engine = PipelineEngine(forward_only(1, 1), 0, {0: stage}, None, dtype=torch.float32, device=world.device)

    def score(self, instances: Sequence[Instance]) -> Scored:
        """Logits on rank 0 and the mean loss; every rank calls with the same instances."""
        task = self.saved.task
        return score_instances(self.model, self.engine, self.mesh, instances, task.head, batch_size=self.batch_size)

    def predict(self, examples: list[Any]) -> list[Prediction]:
        """What the model says of each example; every rank calls, rank 0 gets the answer."""
        task = self.saved.task
        instances = task.instances(examples, train=False)
        logits = self.score(instances).logits
        return task.predictions(examples, instances, logits) if logits else []


def evaluate_files(
    source: Path,
    overrides: list[str],
    *,
    output: Path | None,
    batch_size: int,
    device: str = "auto",
    engine: Engine = Engine(),  # noqa: B008 (it cannot change)
) -> dict[str, dict[str, float]]:
    """Scores of a fine-tuned model on labeled files by split, on every rank, alone or on all ranks of torchrun.

    Args:
        source: the model, its run, or several runs, whose best is taken; see :func:`load_task`.
        overrides: ``data.valid=FILE``, ``data.test=FILE`` and whatever else the section ``data`` of a run has. How
            files are read (``format``, ``columns``, ``header``, ``label_separator``, ``on_bad_row``) is as it was in
            training where it is not given. Settings of the section ``task``, which change those of the model. And
            ``tokenizer.path=PATH`` for a model without a vocabulary.
        output: directory for results, predictions and files to submit; None prints only.
        batch_size: most instances of a forward pass.
        device: auto, cpu or cuda.

    Raises:
        UserError: no model, no files, bad rows in them, or an output that cannot be written; on every rank.
    """
    device = engine.device(device)
    _check_device(device)
    if output is not None:
        _check_directory(output)
    settings = _settings(overrides, "data", "task", "tokenizer")
    given = settings["data"]
    saved = load_task(source, given, settings["task"], _tokenizer(settings))
    task = saved.task
    splits = (*task.valid_splits, *task.test_splits)
    if not splits:
        raise UserError("no file to evaluate on: give one as data.valid=FILE, data.test=FILE or data.directory=DIR")
    scores: dict[str, dict[str, float]] = {}
    files: list[str] = []
    with process_group(device, 600.0) as world:
        scorer = Scorer(saved, world, batch_size, engine)
        for split in splits:
            examples = task.examples(split)
            named = next((name for name in ("label", "answers", "tag") if name in (given.get("columns") or {})), None)
            if named is not None and not any(example.labeled for example in examples):
                raise UserError(
                    f"data.columns.{named} is {given['columns'][named]}, but no row of the {split} file has that: give "
                    f"the column of the labels, or leave data.columns.{named} out where there are none"
                )
            instances = task.instances(examples, train=False)
            scored = scorer.score(instances)
            leave = partial(_leave_split, task, split, examples, instances, scored, output)
            scores[split], written = on_first_rank(leave)
            files += written
        on_first_rank(lambda: _leave_results(saved, scores, files, output))
    return scores


def _leave_split(
    task: Task, split: str, examples: list[Any], instances: list[Instance], scored: Scored, output: Path | None
) -> tuple[dict[str, float], list[str]]:
    """Say, and write, what the model does on a split; its scores and the files."""
    predictions = task.predictions(examples, instances, scored.logits)
    if scored.loss is not None and not math.isfinite(scored.loss):
        raise UserError(
            f"the loss on the {split} split is {scored.loss}: the model gives no numbers, as its weights are damaged "
            "or far too large; give another checkpoint"
        )
    loss = {} if scored.loss is None else {"loss": scored.loss}
    scores = loss | task.metrics(examples, predictions)
    said = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"{split}: {len(examples):,} examples; {said or 'not labeled'}")
    if output is None:
        return scores, []
    output.mkdir(parents=True, exist_ok=True)
    return scores, write_split(output, task, split, examples, predictions)


def _leave_results(
    saved: SavedTask, scores: dict[str, dict[str, float]], files: list[str], output: Path | None
) -> None:
    """Say, and write, what holds for all splits."""
    bad = saved.task.bad_rows
    if bad.count:
        print(f"skipped {bad.count} bad rows, such as {bad.reasons[0]}")
    print(f"the model is {saved.directory}")
    if output is not None:
        results = {"model": str(saved.directory), "splits": scores, "files": files}
        write_json(output / RESULTS_FILE, results | {"data": saved.task.data_fingerprints()})
        print(f"results are in {output}")


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but this machine has no usable CUDA device: give --device cpu")


def _check_directory(output: Path) -> None:
    """Refuse what can be no directory of this user, before anything is computed."""
    try:
        there = next(place for place in (output, *output.absolute().parents) if place.exists())
    except OSError as error:
        raise UserError(f"--output is {output}, which cannot be used: {error.strerror}") from None
    if not there.is_dir():
        raise UserError(f"--output is {output}, but {there} is a file: give a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output is {output}, but {there} may not be written to: give another directory")


def _settings(overrides: list[str], *sections: str) -> dict[str, dict[str, Any]]:
    """Settings by section."""
    tree: dict[str, Any] = {section: {} for section in sections}
    for override in overrides:
        if override.partition(".")[0] not in sections:
            named, example = " or ".join(sections), f"{sections[0]}.{_EXAMPLES[sections[0]]}"
            raise UserError(f"{override!r} is not a setting of the {named}: give such as {example}")
        apply_override(tree, override)
    return tree


def _tokenizer(settings: dict[str, dict[str, Any]]) -> TokenizerSettings | None:
    """The vocabulary that the user gives, for a model that has none beside it."""
    given = settings["tokenizer"]
    return validated(given, TokenizerSettings, source="the settings of the tokenizer") if given else None


class BadRowError(UserError):
    """A row of a stream that cannot be read; those before it are answered."""


def predict_stream(
    source: Path,
    rows: IO[str],
    answers: IO[str],
    *,
    batch_size: int,
    stream: float | None = None,
    on_bad_row: str = "error",
    device: str = "auto",
    engine: Engine = Engine(),  # noqa: B008 (it cannot change)
    progress: bool = False,
    overrides: Sequence[str] = (),
) -> int:
    """Answer JSON lines with JSON lines, in their order; how many could not be read, or answered with numbers.

    Of a file, rows are worked on in the order of their length, a few batches at a time, so that little is padded and a
    long one needs little memory. Of a pipe, those that have come by then are answered together: one at a time where
    each waits for the answer to the one before, and as of a file where they come faster than they are answered.

    Args:
        source: directory of the model, its run, or several runs, whose best is taken.
        rows: one JSON object per line, with the keys that the task reads. Bytes that are not UTF-8 come as lone
            surrogates, which are found.
        batch_size: most texts of a forward pass.
        stream: answer every row by itself (0), or with those that come within so many seconds of it, ``batch_size``
            rows at most; None leaves it to how fast they come.
        on_bad_row: ``error`` stops at a row that cannot be read; ``skip`` answers it with its error.
        device: auto, cpu or cuda.
        overrides: ``task.key=value``, which change settings of the model's task, and ``tokenizer.path=PATH``.

    Raises:
        UserError: no model; :class:`BadRowError`, once all rows before it are answered.
    """
    if launched_world_size() > 1:
        raise UserError("predict works in one process: divide the input into files and start one for each")
    device = engine.device(device)
    _check_device(device)
    settings = _settings(list(overrides), "task", "tokenizer")
    saved = load_task(source, None, settings["task"], _tokenizer(settings))
    most = batch_size * _BUFFERED_BATCHES if stream is None else batch_size if stream else 1
    bad = done = 0
    bar = tqdm(unit="row", disable=not progress, file=sys.stderr, dynamic_ncols=True)
    with process_group(device, 600.0) as world, bar, arriving(rows) as arrivals:
        scorer = Scorer(saved, world, batch_size, engine)
        while lines := arrivals.take(most, stream or 0.0):
            read: list[Example | dict[str, Any]] = []
            stopped = None
            for number, line in enumerate(lines, done + 1):
                if not line.strip().lstrip("\ufeff"):
                    continue
                found = _example(saved, number, line)
                if isinstance(found, dict) and on_bad_row == "error":
                    stopped = found["error"]
                    break
                read.append(found)
            good = [example for example in read if isinstance(example, Example)]
            predictions = iter(scorer.predict(good) if good else [])
            for example in read:
                answer = next(predictions) if isinstance(example, Example) else example
                line, finite = as_line(answer)
                bad += "error" in answer or not finite
                answers.write(line)
            answers.flush()
            if stopped is not None:
                raise BadRowError(f"{stopped} (the rows before it are answered; --on-bad-row skip goes on)")
            done += len(lines)
            bar.update(len(lines))
    return bad


def _example(saved: SavedTask, number: int, line: str) -> Example | dict[str, Any]:
    """The example of a row, or the answer to one that cannot be read."""
    where = f"line {number}"
    name: str | int = where
    try:
        row = parse_object(line.lstrip("\ufeff"))
        name = name_of(row, where)
        return saved.task.example_from(row, where)
    except RowError as error:
        return {"id": name, "error": f"{where}: {error}"}
    except UserError as error:
        return {"id": name, "error": str(error)}
