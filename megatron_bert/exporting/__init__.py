# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert export`: a quantized model in forms that other programs run."""
