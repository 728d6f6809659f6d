# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert doctor`: whether machines are fit for a run, found out before it is started."""
