# SPDX-License-Identifier: Apache-2.0
"""What a run takes before it starts: closed forms of memory, messages, operations and time, and a simulated world."""
