"""`python -m megatron_bert`, for launchers such as torchrun."""

import sys

from megatron_bert.cli import main

sys.exit(main())
