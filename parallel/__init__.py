# SPDX-License-Identifier: Apache-2.0
"""Tensor, pipeline and data parallelism on torch.distributed: tensors, groups and stages, no model."""
