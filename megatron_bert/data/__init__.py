# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, corpora, samples and batches, which know nothing of training."""
