# SPDX-License-Identifier: Apache-2.0
"""Quantisation of fine-tuned models: calibration, quantisation-aware training, and what it costs."""
