# SPDX-License-Identifier: Apache-2.0
"""Checkpoint conversion: everything Megatron BERT was ever saved as, in and out."""
