# SPDX-License-Identifier: Apache-2.0
"""The public classes of the MegatronBERT family, with the documented names, arguments and outputs, on the one encoder.

They add to :mod:`megatron_bert.model` what users of these classes ask of it: batches ``[B, S]`` with attention masks,
losses from labels, outputs by name, decoding, and directories of ``config.json`` and safetensors. See docs/models.md.
"""
