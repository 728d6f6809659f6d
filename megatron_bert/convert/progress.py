# SPDX-License-Identifier: Apache-2.0
"""A progress bar over bytes, on a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress(tqdm):
    """Counts the bytes of tensors that were dealt with.

    Args:
        total: bytes in all.
        shown: whether to show a bar; on a terminal only when None.
        title: of the bar.
    """

    def __init__(self, total: int, *, shown: bool | None = None, title: str = "converting") -> None:
        disable = not sys.stderr.isatty() if shown is None else not shown
        super().__init__(total=total, unit="B", unit_scale=True, desc=title, disable=disable, leave=False)
