# SPDX-License-Identifier: Apache-2.0
"""What a user can say about a source, and about what to write: in a program, or on the command line.

Nothing slow is imported: the command line starts with these.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from megatron_bert.arguments import given_path
from parallel.errors import UserError

Gelu = Literal["erf", "tanh"]
#: hidden_act by kind of GELU.
GELU_NAMES = {"erf": "gelu", "tanh": "gelu_new"}
#: Number formats that a checkpoint may hold and be written in.
DTYPE_NAMES = ("float32", "float16", "bfloat16")
_ORDER = "order of query, key and value rows"
_NORMS = "megatron-core: norms as modules of their own, or in the linear layers as with Transformer Engine"
_VOCABULARY = "vocabulary: its size is the true one, and it is put beside the weights"


def _option(default: Any, text: str, kind: Any = None, metavar: str | None = None, **more: Any) -> Any:
    """A field that is an argument of the command line too; under another name as ``flag``."""
    typed = {"type": kind, "metavar": metavar} if kind else {}
    return field(default=default, metadata={"help": text, **typed, **more})


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Fields that the command line has too."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices and value != entry.default and value not in choices:
                raise UserError(f"--{entry.name} is {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")

    @classmethod
    def add_to(cls, group: Any) -> None:
        """Add the arguments to a parser, or a group of one."""
        for entry in fields(cls):
            if entry.metadata:
                argument = dict(entry.metadata)
                flag = argument.pop("flag", entry.name).replace("_", "-")
                group.add_argument(f"--{flag}", default=entry.default, **argument)

    @classmethod
    def given(cls, arguments: argparse.Namespace) -> Self:
        """What was given by the arguments of :meth:`add_to`.

        Raises:
            UserError: one has a value that cannot be.
        """
        stated = [entry for entry in fields(cls) if entry.metadata]
        return cls(**{entry.name: getattr(arguments, entry.metadata.get("flag", entry.name)) for entry in stated})


@dataclass(frozen=True, kw_only=True)
class ReadOptions(_Options):
    """What the source does not say, or says wrongly; None takes the source's word or the usual value."""

    gelu: Gelu | None = _option(None, "kind of GELU the weights were trained with", choices=tuple(GELU_NAMES))  # noqa: RUF009 (a field)
    layer_norm_eps: float | None = _option(None, "epsilon of the layer norms, usually 1e-5", float, "E")
    true_vocab_size: int | None = _option(None, "words; rows after them are padding", int, "N")
    num_attention_heads: int | None = _option(None, "heads per layer", int, "N")
    checkpoint_version: float | None = _option(
        None, f"{_ORDER} in the source: 0, 1.0, 2.0 or 3.0", float, "V", flag="source_checkpoint_version"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_norm_eps is not None and not 0 < self.layer_norm_eps < 1:
            raise UserError(f"--layer-norm-eps is {self.layer_norm_eps}: give a small positive number, such as 1e-5")
        for name in ("true_vocab_size", "num_attention_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class WriteOptions(_Options):
    """How to write; formats refuse what they cannot do.

    Attributes:
        max_shard_bytes: Hugging Face only: size above which the weights are divided over several files.
    """

    tensor: int = _option(1, "tensor-parallel size, Megatron's formats", int, "N")
    pipeline: int = _option(1, "pipeline-parallel size, the same", int, "N")
    virtual_stages: int = _option(1, "chunks of each pipeline stage", int, "V")
    checkpoint_version: float | None = _option(None, f"{_ORDER} to write for --to megatron (default: 3.0)", float, "V")
    norms: Literal["local", "fused"] = _option("local", _NORMS, choices=("local", "fused"))
    dtype: str | None = _option(None, "number format of the weights (default: as stored)", choices=DTYPE_NAMES)
    tokenizer: Path | None = _option(None, _VOCABULARY, given_path, "PATH")  # noqa: RUF009
    max_shard_bytes: int = 5_000_000_000
