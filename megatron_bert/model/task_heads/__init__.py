# SPDX-License-Identifier: Apache-2.0
"""The kinds of heads that tasks have on the encoder: a file each, and a table."""
