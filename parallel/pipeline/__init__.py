# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: schedules as data, a simulator and an engine that runs them."""
