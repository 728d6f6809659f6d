# SPDX-License-Identifier: Apache-2.0
"""Starting runs: Slurm jobs, what a launched process needs and leaves behind, and a check of the machines."""
