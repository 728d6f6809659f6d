# SPDX-License-Identifier: Apache-2.0
"""Every class of both families, for tests that run through all of them."""

from __future__ import annotations

import pytest

from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.ibert.family import support as ibert

#: The module that makes a class, and the class's name without its family.
CLASSES = [(make, head) for make in (megatron, ibert) for head in make.HEADS]
NAMES = [f"{'IBert' if make is ibert else 'MegatronBert'}{head}" for make, head in CLASSES]
EACH_CLASS = pytest.mark.parametrize(("make", "head"), CLASSES, ids=NAMES)
