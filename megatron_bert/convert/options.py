# SPDX-License-Identifier: Apache-2.0
"""What a user can say about a source, and about what to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_bert.convert.state import DTYPES
from parallel.errors import UserError

Gelu = Literal["erf", "tanh"]
#: hidden_act by kind of GELU.
GELU_NAMES = {"erf": "gelu", "tanh": "gelu_new"}


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the source does not say, or says wrongly; None takes the source's word or the usual value.

    Attributes:
        gelu: kind of GELU the weights were trained with.
        layer_norm_eps: epsilon of the layer norms.
        true_vocab_size: number of words; rows of the embedding table after them are padding.
        num_attention_heads: heads per layer.
        checkpoint_version: Megatron's version of the order of query, key and value rows.
    """

    gelu: Gelu | None = None
    layer_norm_eps: float | None = None
    true_vocab_size: int | None = None
    num_attention_heads: int | None = None
    checkpoint_version: float | None = None

    def __post_init__(self) -> None:
        if self.gelu is not None and self.gelu not in GELU_NAMES:
            raise UserError(f"--gelu is {self.gelu!r}: choose erf or tanh")
        if self.layer_norm_eps is not None and not 0 < self.layer_norm_eps < 1:
            raise UserError(f"--layer-norm-eps is {self.layer_norm_eps}: give a small positive number, such as 1e-5")
        for name in ("true_vocab_size", "num_attention_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write; formats refuse what they cannot do.

    Attributes:
        tensor, pipeline, virtual_stages: how Megatron's files are divided.
        checkpoint_version: order of query, key and value rows, Megatron's legacy format only; None is 3.0.
        norms: where megatron-core keeps the layer norms: in modules of their own (``local``) or inside the linear
            layers behind them (``fused``, as with Transformer Engine).
        dtype: number format of the weights; None keeps what is stored.
        tokenizer: vocabulary to put beside the weights, where the format has a place for it.
        max_shard_bytes: Hugging Face only: size above which the weights are divided over several files.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    checkpoint_version: float | None = None
    norms: Literal["local", "fused"] = "local"
    dtype: str | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.norms not in ("local", "fused"):
            raise UserError(f"--norms is {self.norms!r}: choose local or fused")
