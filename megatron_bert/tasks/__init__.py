# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning tasks: files to sequences and labels, logits to predictions and metrics, without torch."""
