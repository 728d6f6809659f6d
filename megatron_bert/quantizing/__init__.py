"""Quantisation of fine-tuned models: calibration, quantisation-aware training, and what it costs."""
