"""Pretraining, conversion, fine-tuning and quantisation of BERT encoders with Megatron parallelism."""

__version__ = "0.1.0"
