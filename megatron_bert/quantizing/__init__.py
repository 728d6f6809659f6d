# SPDX-License-Identifier: Apache-2.0
"""Quantization of fine-tuned models: calibration, quantization-aware training, and what it costs."""
