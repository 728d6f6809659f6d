# SPDX-License-Identifier: Apache-2.0
"""Turns the garbage collector off: the first module that `conftest` and the server of `worlds` load, whose all stay."""

import gc

gc.disable()

#: Objects made between two collections in tests, rather than the 700 of Python 3.11: to look for garbage so often takes
#: a fifteenth of their time.
COLLECT_AFTER = 20_000
