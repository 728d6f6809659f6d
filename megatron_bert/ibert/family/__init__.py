# SPDX-License-Identifier: Apache-2.0
"""The public classes of I-BERT, with the documented names, arguments and outputs, on the one encoder.

They are :mod:`megatron_bert.family` with RoBERTa's norms, positions and heads, and with ``quant_mode``. See
docs/models.md.
"""

from megatron_bert.ibert.family.ranges import load_ranges, save_ranges

__all__ = ["load_ranges", "save_ranges"]
