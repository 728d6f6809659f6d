# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, corpora and batches."""
