# SPDX-License-Identifier: Apache-2.0
"""What a run will cost before it starts: FLOPs, memory, communication and pipeline schedules."""
