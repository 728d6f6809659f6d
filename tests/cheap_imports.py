# SPDX-License-Identifier: Apache-2.0
"""Makes imports take less time: the first module that `conftest` and the server of `worlds` load."""

import gc
import sys

# Imports make objects by the hundred thousand, which all stay: looking through them for garbage over and over takes a
# third of the time of collecting the tests.
gc.disable()

# Hundreds of processes import the same files, which are compiled once and not in each of them.
sys.dont_write_bytecode = False

#: Objects made between two collections in tests, rather than the 700 of Python 3.11: to look for garbage so often takes
#: a fifteenth of their time.
COLLECT_AFTER = 20_000
