# SPDX-License-Identifier: Apache-2.0
"""Files of tensors, whoever wrote them: read without running them, and without reading more than what is asked for."""
