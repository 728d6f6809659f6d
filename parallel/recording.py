# SPDX-License-Identifier: Apache-2.0
"""Whether code runs once to be recorded, so that what it does must not depend on the values of tensors."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Whether operations are recorded for other inputs, by ``torch.compile``, ``torch.export`` or ``torch.jit.trace``.

    ``torch.onnx.export`` does the one or the other. A choice by the value of a tensor would be part of the record.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def values_unknown() -> bool:
    """Whether tensors have no values to choose by: they are recorded, or in a ``FakeTensorMode`` only have shapes."""
    if is_recorded():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
