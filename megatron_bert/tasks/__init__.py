# SPDX-License-Identifier: Apache-2.0
"""What a pretrained encoder is used for."""
