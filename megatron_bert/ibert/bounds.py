# SPDX-License-Identifier: Apache-2.0
"""Scales of what leaves the integer encoder, for all who read it; nothing here imports torch."""

from __future__ import annotations

#: Fraction bits of logits.
LOGIT_BITS = 12
#: Fraction bits of tanh's results, the pooler's.
TANH_BITS = 15
