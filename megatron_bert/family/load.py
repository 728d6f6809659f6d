"""Weights from a directory of transformers' layout into a model of any head and tensor-parallel size."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.huggingface import WEIGHTS, open_weights
from megatron_bert.convert.state import StateTensor
from megatron_bert.family.kinds import told
from megatron_bert.family.names import Names, fuse
from megatron_bert.model.configuration_checks import NUMBER_FORMATS
from megatron_bert.model.resharding import fill
from parallel.errors import UserError
from parallel.sharding import ParallelModule, initialize

if TYPE_CHECKING:
    from megatron_bert.family.pretrained import PreTrainedModel

logger = logging.getLogger(__name__)

#: Buffers of older versions.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass
class LoadingReport:
    """What did not fit, by transformers' names.

    Attributes:
        missing: parameters that the files do not hold; they have initial values.
        unexpected: what the files hold beyond the model.
        mismatched: parameters of another shape than the files'; they have initial values.
        quantization: buffers of transformers' quantised layers, which no parameter is filled from.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    quantization: dict[str, StateTensor] = field(default_factory=dict)

    def as_dict(self) -> dict[str, list[str]]:
        """By kind."""
        return {
            "missing_keys": self.missing,
            "unexpected_keys": self.unexpected,
            "mismatched_keys": self.mismatched,
            "quantization_keys": list(self.quantization),
        }

    def warn(self, model: str, source: Path) -> None:
        """Say what did not fit, where something did not."""
        if self.missing or self.mismatched:
            names = _some(self.missing + self.mismatched)
            logger.warning("%s: not in %s, so they have initial values; train them: %s", model, source, names)
        if self.unexpected:
            logger.warning("%s: not used of %s: %s", model, source, _some(self.unexpected))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def load_model(
    model: PreTrainedModel, directory: Path, dtype: torch.dtype | str | None, allow_mismatch: bool
) -> LoadingReport:
    """Fill a model whose parameters hold no values.

    Args:
        model: of any class.
        directory: with the weights.
        dtype: number format; ``auto`` takes the files', None float32.
        allow_mismatch: give parameters of another shape than the files' initial values.

    Raises:
        UserError: no weights, or of another shape.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory: give one with a model on this machine; none are downloaded")
    tree = FileTree(str(directory), {path.name: path for path in directory.iterdir() if path.is_file()}, directory)
    if not any(name in tree for name in WEIGHTS):
        raise UserError(f"{directory} holds no weights: expected one of {', '.join(WEIGHTS)}")
    stored = _normalised(open_weights(tree)[0], model.names, model.config.tie_word_embeddings)
    model.to(_number_format(dtype, stored))
    report, plan = LoadingReport(), {}
    for name, parameter in model.named_parameters():
        keys = model.names.theirs(name)
        found = [stored[key] for key in keys if key in stored]
        if len(found) < len(keys):
            report.missing += [key for key in keys if key not in stored]
        elif _fits(model, parameter, name, keys, found, allow_mismatch):
            plan[name] = (parameter, found)
        else:
            report.mismatched += keys
    used = {key for name, _ in model.named_parameters() for key in model.names.theirs(name)}
    beyond = {key: tensor for key, tensor in stored.items() if key not in used}
    report.quantization = {key: t for key, t in beyond.items() if model.names.of_quantization(key)}
    report.unexpected = [key for key in beyond if key not in report.quantization]
    _initialize_rest(model, plan.keys())
    for parameter, found in plan.values():
        values = fuse([tensor.load() for tensor in found], model.config.head_dim)
        fill(parameter, _padded(values, parameter.shape[0]), model.tp)
    report.warn(type(model).__name__, directory)
    return report


def _normalised(stored: dict[str, StateTensor], names: Names, tied: bool) -> dict[str, StateTensor]:
    """Tensors under the names of the classes with heads, without buffers and second names of one tensor."""
    named = {}
    for key, tensor in stored.items():
        key = names.with_prefix(key)
        if not key.endswith(_BUFFERS):
            named[key] = tensor
    copy = named.pop(names.output_bias_copy, None)
    if copy is not None and (not tied or names.output_bias not in named):
        named[names.output_bias] = copy  # the one that an untied head adds
    if tied:
        named.pop(names.output_matrix, None)
    return named


def format_name(dtype: torch.dtype | str | None) -> str:
    """The name of a number format: ``float16`` of ``torch.float16`` and of ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def _number_format(dtype: torch.dtype | str | None, stored: dict[str, StateTensor]) -> torch.dtype:
    if dtype is None:
        return torch.float32
    name = format_name(dtype)
    if name == "auto":
        return next(iter(stored.values())).dtype
    if name not in NUMBER_FORMATS:
        raise UserError(f"torch_dtype is {told(dtype)}: choose auto or one of {', '.join(NUMBER_FORMATS)}")
    return getattr(torch, name)


def _fits(
    model: PreTrainedModel,
    parameter: nn.Parameter,
    name: str,
    keys: tuple[str, ...],
    found: list[StateTensor],
    allow_mismatch: bool,
) -> bool:
    rows = model.config.vocab_size if model.has_words(name) else parameter.shape[0] // len(keys)
    shape = (rows, *parameter.shape[1:])
    wrong = [tensor for tensor in found if tensor.shape != shape]
    if wrong and not allow_mismatch:
        raise UserError(
            f"{wrong[0].origin} has shape {list(wrong[0].shape)}, but the model {list(shape)}: its configuration is of "
            "another model (ignore_mismatched_sizes=True starts such parameters anew)"
        )
    return not wrong


def _initialize_rest(model: PreTrainedModel, loaded: object) -> None:
    """Draw initial values for every module with a parameter that is not about to be loaded."""
    names = {name for name, _ in model.named_parameters()} - set(loaded)  # type: ignore[call-overload]
    if not names:
        return
    seed = model.fresh_seed()
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if isinstance(module, ParallelModule) and own & names:
            initialize(module, seed, prefix=model.names.canonical(f"{prefix}."))


def _padded(values: Tensor, rows: int) -> Tensor:
    if values.shape[0] == rows:
        return values
    return torch.cat((values, values.new_zeros((rows - values.shape[0], *values.shape[1:]))))
