# SPDX-License-Identifier: Apache-2.0
"""The training loop of any objective, from settings to checkpoints, and pretraining as the first objective."""
