# SPDX-License-Identifier: Apache-2.0
"""Engines that run a quantized model in integers; see ``docs/ibert.md``."""
