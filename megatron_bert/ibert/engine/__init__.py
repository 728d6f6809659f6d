"""Engines that run a quantized model in integers; see ``docs/ibert.md``."""
