# SPDX-License-Identifier: Apache-2.0
"""The encoder and its heads, one class at every layout; neither settings nor data."""
