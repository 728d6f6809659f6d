# SPDX-License-Identifier: Apache-2.0
"""Vocabularies beside models: transformers' tokenizers read what is saved here."""

from __future__ import annotations

from transformers import AutoTokenizer

from megatron_bert.convert.tokenizer_files import save_tokenizer

__all__ = ["AutoTokenizer", "save_tokenizer"]
