# SPDX-License-Identifier: Apache-2.0
"""Turns the garbage collector off: the first module that the server of `worlds` loads, whose modules all stay."""

import gc

gc.disable()
