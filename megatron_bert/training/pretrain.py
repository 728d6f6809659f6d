# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert pretrain`: from settings to a finished run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

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
from megatron_bert.training.objective import Objective
from megatron_bert.training.pretraining import Pretraining
from megatron_bert.training.run import find_start
from megatron_bert.training.running import Procedure, Stopped, is_spare, opened, train
from parallel.checkpoint import read_state
from parallel.errors import UserError
from parallel.process_group import launched_rank, launched_world_size

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
    if is_spare(layout):
        return None
    tokenizer = check_inputs(settings)
    objective = Pretraining(settings, tokenizer, source)
    checkpoint = find_start(settings, objective).checkpoint
    if checkpoint is not None and _has_nothing_left(read_state(checkpoint), objective):
        # Not an error: a job that is started again after it finished has nothing left to do.
        if launched_rank() == 0:
            steps = f"training.steps {objective.total_steps}"
            print(f"{checkpoint} has reached {steps}: nothing left to do; raise it to train on")
        return None
    with opened(settings, layout, ends_process=ends_process) as command:
        if settings.training.cuda_graphs and command.world.device.type != "cuda":
            raise UserError(
                "training.cuda_graphs is true, but this machine has no GPU: set training.cuda_graphs=false to train on "
                "its processors"
            )
        stopped: Stopped | None = train(command, settings, objective, PretrainProcedure(tokenizer))
    return None if stopped is None else stopped.reason


class PretrainProcedure(Procedure):
    """Pretraining leaves its checkpoints, and the vocabulary that its model is used with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def draw(self, run_dir: Path, objective: Objective) -> object:  # noqa: ARG002
        """Losses, gradient norm and learning rate."""
        return draw_curves(run_dir)


def _has_nothing_left(state: dict[str, Any], objective: Pretraining) -> bool:
    """Whether a checkpoint is of the last step, and that was evaluated if anything is."""
    evaluated = not objective.evaluates or state.get("evaluated_step", state["step"]) == state["step"]
    return bool(state["step"] == objective.total_steps) and evaluated


def take_sizes(settings: Settings, source: CanonicalState | None = None) -> Settings:
    """The settings with the sizes of the checkpoint that training starts from, if it starts from one.

    Args:
        source: ``model.from``, open; None opens it.

    Raises:
        UserError: the checkpoint cannot be read, a size is set that is not its, or its norms are elsewhere.
    """
    start = settings.model.from_
    if start is None:
        return settings
    with open_checkpoint(start if source is None else source) as state:
        config = state.config
        check_placement(state, MegatronBertConfig())
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
