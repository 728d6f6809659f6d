"""Checkpoint conversion: everything Megatron BERT was ever saved as, in and out."""
