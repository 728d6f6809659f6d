# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning runs: a task as an objective, the saved model, evaluation and prediction."""
