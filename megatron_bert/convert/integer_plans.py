# SPDX-License-Identifier: Apache-2.0
"""By what the integer engine's plans are known: nothing converts them, but what they are is said. Needs no torch."""

from __future__ import annotations

#: Name of a plan's file in a model's directory.
PLAN_NAME = "integer_plan.safetensors"
#: What the header of a plan's file calls its format, and in how many bytes that is looked for.
FORMAT, HEADER_BYTES = "megatron-bert integer plan", 1 << 20


def begins_as_plan(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a plan."""
    length = int.from_bytes(start[:8], "little")
    return FORMAT.encode() in start[8 : 8 + length]
