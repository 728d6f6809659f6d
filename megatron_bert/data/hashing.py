# SPDX-License-Identifier: Apache-2.0
"""Keyed 64-bit hashing: the source of every random choice that must be a pure function of its position.

All functions take Python integers or uint64 arrays and give the same numbers for both, so one definition serves the
vectorized index builders and the one-sample paths.
"""

from typing import TypeVar

import numpy as np

MASK64 = (1 << 64) - 1

Words = TypeVar("Words", int, np.ndarray)
"""A Python integer in [0, 2**64), or a uint64 array of at least one dimension."""


def mix64(words: Words) -> Words:
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection."""
    mixed: Words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK64
    mixed ^= mixed >> 31
    return mixed


def keyed_hash(key: int, words: Words) -> Words:
    """Hash 64-bit words under a 64-bit key; different keys give unrelated functions."""
    # The key is scrambled first: consecutive seeds must not give shifted copies of one sequence.
    salt = mix64((key & MASK64) ^ 0x9E3779B97F4A7C15)
    return mix64((words * 0x9E3779B97F4A7C15 & MASK64) ^ salt)


def derive_key(*parts: int) -> int:
    """Fold integers (seed, epoch, ...) into one 64-bit key; the order of the parts matters."""
    key = 0
    for part in parts:
        key = keyed_hash(key, part & MASK64)
    return key
