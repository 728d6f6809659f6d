"""The public classes of I-BERT, with the documented names, arguments and outputs, on the one encoder.

They are :mod:`megatron_bert.family` with RoBERTa's norms, positions and heads. See docs/models.md.
"""
