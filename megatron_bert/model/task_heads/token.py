# SPDX-License-Identifier: Apache-2.0
"""A class for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bert.model.task_heads.kind import HeadKind


class TokenKind(HeadKind):
    """A dense layer on tokens. Labels: int64 ``[R]``, the class of each."""

    name = "token"
    title = "tokens"
    class_ending = "ForTokenClassification"

    def labels(self, of_instances: Sequence[Tensor]) -> Tensor:
        """Those of all rows, end to end."""
        return torch.cat(list(of_instances))
