"""Tokenizers, corpora and batches."""
