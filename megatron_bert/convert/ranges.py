# SPDX-License-Identifier: Apache-2.0
"""The ranges of a quantized model, as files hold them.

Its weights stay those of the float model. ``quantization.json`` beside them holds how they were quantized and the range
of every quantizer, by its name in a training checkpoint; transformers' I-BERT has some of them as buffers, of which
``attention_input`` is the output of what lies below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.activations import LEAST_GELU
from parallel.errors import UserError

RANGES_NAME = "quantization.json"
#: Of the arithmetic that ranges belong to: see the specification.
VERSION = 2
#: The place of the sum of the embeddings, whose range is not taken from their files.
EMBEDDINGS_SUM = "embeddings_act1"
_EMBEDDINGS = {"sum": EMBEDDINGS_SUM, "output": "output_activation"}
_LAYER = {
    "query": "attention.self.query_activation",
    "key": "attention.self.key_activation",
    "value": "attention.self.value_activation",
    "context": "attention.self.output_activation",
    "attention_sum": "attention.output.ln_input_act",
    "middle": "attention.output.output_activation",
    "mlp_input": "pre_intermediate_act",
    "gelu": "intermediate.output_activation",
    "mlp_sum": "output.ln_input_act",
    "output": "output.output_activation",
}


@dataclass(frozen=True)
class Ranges:
    """How a model was quantized, and what its calibration and training found.

    Attributes:
        settings: bit widths and exceptions: fields of :class:`megatron_bert.ibert.settings.QuantizationConfig`.
        limits: name of a quantizer -> largest magnitude, of those that are known.
        frozen: whether they are final.
    """

    settings: Mapping[str, Any]
    limits: Mapping[str, float]
    frozen: bool

    def as_json(self) -> str:
        """What ``quantization.json`` holds."""
        # A float32 number is exact as a Python float, and that as its shortest text.
        content = {
            "version": VERSION,
            "settings": dict(self.settings),
            "frozen": self.frozen,
            "ranges": dict(self.limits),
        }
        return json.dumps(content, indent=1) + "\n"


def parse_ranges(text: str | bytes, label: str) -> Ranges:
    """The inverse of :meth:`Ranges.as_json`.

    Raises:
        UserError: the text is something else; ``label`` says what it is.
    """
    try:
        content: Any = json.loads(text)
        check_version(label, content.get("version", 1))
        limits = {str(name): float(limit) for name, limit in content["ranges"].items()}
        if not all(0 <= limit < inf for limit in limits.values()):
            raise ValueError("a range that is none")
        return Ranges(dict(content["settings"]), limits, content["frozen"] is True)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label} is damaged ({type(error).__name__}): save the quantized model again") from None


def check_version(label: str, version: object) -> None:
    """Refuse ranges of another version of the integer arithmetic (UserError); ``label`` says what holds them."""
    if version == VERSION:
        return
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{label} has version {version}, this is for {VERSION}: load it with a newer megatron-bert")
    raise UserError(
        f"{label} has version {version} of the integer arithmetic, whose numbers are others in version {VERSION}: "
        "quantize the float model again"
    )


def their_place(name: str) -> str | None:
    """The layer of transformers' IBert encoder that has the range of a quantizer; None of those outside of it."""
    owner, _, place = name.rpartition(".ranges.")
    if owner == "embeddings":
        return f"embeddings.{_EMBEDDINGS[place]}"
    if not owner.startswith("encoder.layers."):
        return None
    number = int(owner.split(".")[2])
    if place in _LAYER:
        return f"encoder.layer.{number}.{_LAYER[place]}"
    below = f"encoder.layer.{number - 1}.output" if number else "embeddings"
    return f"{below}.output_activation"


def their_buffers(limits: Mapping[str, float]) -> dict[str, Tensor]:
    """The ranges as transformers' quantized layers have them, by their names in the bare encoder."""
    tensors = {}
    for name, limit in limits.items():
        place = their_place(name)
        if place is not None and limit > 0.0:
            tensors[f"{place}.x_min"] = torch.tensor([LEAST_GELU if name.endswith(".gelu") else -limit])
            tensors[f"{place}.x_max"] = torch.tensor([limit])
    return tensors
