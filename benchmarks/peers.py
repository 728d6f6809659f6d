# SPDX-License-Identifier: Apache-2.0
"""transformers, the library that benchmarks compare with; training and serving do without it."""

from __future__ import annotations

import sys

try:
    import transformers
except ModuleNotFoundError as error:
    print(
        f"this benchmark compares with transformers, and {error.name} is not installed: run "
        "`bash launch/setup.sh --test`, or pip install '.[test]' in the checkout",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

__all__ = ["transformers"]
