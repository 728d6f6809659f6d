# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert pretrain`: from settings to a finished run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

from megatron_bert.config import Settings
from megatron_bert.config_checks import check_settings
from megatron_bert.convert.opening import check_placement, open_checkpoint
from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.indexed import IndexedDataset
from megatron_bert.data.sidecar import check_tokenizer
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.model.activations import same_activation
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.training.curves import draw_curves
from megatron_bert.training.first_rank import on_first_rank
from megatron_bert.training.metrics import Report
from megatron_bert.training.placement import placement_notes
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.run import Start, check_device, find_start, write_start
from megatron_bert.training.run_lock import owning
from megatron_bert.training.signals import StopRequest, note_stop
from megatron_bert.training.starting import start_trainer
from megatron_bert.training.trainer import Trainer
from parallel.checkpoint import read_state
from parallel.errors import UserError
from parallel.mesh import ParallelMesh
from parallel.process_group import launched_rank, launched_world_size, process_group, wait_as_spare

#: Settings that a checkpoint to start from decides.
CHECKPOINT_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)


def pretrain(settings: Settings, *, ends_process: bool = False) -> str | None:
    """Train as the settings say, resuming where an earlier run of the same directory stopped.

    Args:
        settings: of the run.
        ends_process: whether the process ends after this; see :class:`StopRequest`.

    Returns:
        Why the run stopped before its last step; None if it is done.

    Raises:
        UserError: settings, files or world size do not fit; found before any process group starts where possible.
    """
    start_from = settings.model.from_
    with nullcontext() if start_from is None else open_checkpoint(start_from) as source:  # once, for sizes and weights
        return _pretrain(take_sizes(settings, source), source, ends_process=ends_process)


def _pretrain(settings: Settings, source: CanonicalState | None, *, ends_process: bool) -> str | None:
    layout = check_settings(settings, launched_world_size())
    if launched_rank() >= layout.world_size:
        wait_as_spare()
        return None
    tokenizer = check_inputs(settings)
    training, objective = settings.training, Pretraining(settings, tokenizer, source)
    checkpoint = find_start(settings, objective).checkpoint
    if checkpoint is not None and _has_nothing_left(read_state(checkpoint), objective):
        # Not an error: a job that is started again after it finished has nothing left to do.
        if launched_rank() == 0:
            print(f"{checkpoint} has reached training.steps {training.steps}: nothing left to do; raise it to train on")
        return None
    with process_group(training.device, settings.parallel.timeout_seconds, layout.world_size) as world:
        check_device(settings, world)
        with owning(training.run_dir, settings.parallel.timeout_seconds) as lock:
            with StopRequest(training.max_minutes, ends_process=ends_process, lock=lock) as stop:
                mesh = ParallelMesh(layout, world.device)
                # Looks for the checkpoint again: who owned the directory until now may have saved since.
                start, trainer = start_trainer(settings, objective, mesh, world, lock)
                placement = placement_notes(layout, start.checkpoint)
                objective.prepare(mesh, world)
                on_first_rank(lambda: write_start(settings, tokenizer))
                reason = _train(settings, trainer, start, placement, stop)
            if world.is_first and reason is not None:
                note_stop(training.run_dir, reason, trainer.step)
    return reason


def _train(settings: Settings, trainer: Trainer, start: Start, placement: list[str], stop: StopRequest) -> str | None:
    """Report what is trained, and train it; why it stopped early."""
    training, active = settings.training, trainer.world.is_first
    with Report(training.run_dir, settings.logging, active=active, start=trainer.step, steps=training.steps) as report:
        for line in (trainer.describe(), *cast(Pretraining, trainer.objective).describe_data(trainer.step)):
            report.say(line)
        if start.checkpoint is not None:
            report.say(f"resuming from {start.checkpoint}")
        elif settings.model.from_ is not None:
            report.say(f"starting from the weights of {settings.model.from_}")
        alone = (
            [] if trainer.objective.evaluates else [f"data.split {settings.data.split} leaves nothing to evaluate on"]
        )
        for note in (*trainer.model.notes, *start.notes, *alone, *placement):
            report.say(f"note: {note}")
        reason = trainer.run(stop, report)
        report.attempt("curves.png", "there is no picture of the run", lambda: draw_curves(training.run_dir))
        if reason is not None:
            report.say(f"stopped by {reason} after step {trainer.step}: the same command goes on from there")
    return reason


def _has_nothing_left(state: dict[str, Any], objective: Pretraining) -> bool:
    """Whether a checkpoint is of the last step, and that was evaluated if anything is."""
    evaluated = not objective.evaluates or state.get("evaluated_step", state["step"]) == state["step"]
    return bool(state["step"] == objective.total_steps) and evaluated


def take_sizes(settings: Settings, source: CanonicalState | None = None) -> Settings:
    """The settings with the sizes of the checkpoint that training starts from, if it starts from one.

    Args:
        settings: of a run.
        source: ``model.from``, open; None opens it.

    Raises:
        UserError: the checkpoint cannot be read, a size is set that is not its, or its norms are elsewhere.
    """
    start = settings.model.from_
    if start is None:
        return settings
    if source is None:
        with open_checkpoint(start) as source:
            return take_sizes(settings, source)
    config = source.config
    check_placement(source, MegatronBertConfig())
    sizes: dict[str, object] = {}
    for name in CHECKPOINT_SIZES:
        there, here = getattr(config, name), getattr(settings.model, name)
        same = same_activation(there, here) if name == "hidden_act" else here in (there, None)
        if name in settings.model.model_fields_set and not same:
            raise UserError(
                f"model.{name} is {here}, but the model in {start} has {there}: remove the "
                "setting to use the checkpoint's"
            )
        sizes[name] = there
    return settings.model_copy(update={"model": settings.model.model_copy(update=sizes)})


def check_inputs(settings: Settings) -> Tokenizer:
    """Open every file the run will read.

    Raises:
        UserError: one is missing, damaged, or made with another tokenizer.
    """
    tokenizer = load_tokenizer(settings.tokenizer.path, lowercase=settings.tokenizer.lowercase)
    for corpus in [*settings.data.train, *(settings.data.valid or [])]:
        IndexedDataset(corpus.prefix)
        check_tokenizer(corpus.prefix, tokenizer)
    return tokenizer
