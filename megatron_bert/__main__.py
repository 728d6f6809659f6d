# SPDX-License-Identifier: Apache-2.0
"""`megatron-bert`, and `python -m megatron_bert` for launchers such as torchrun."""

import sys

from megatron_bert.starting import catch_signals, collect_rarely


def main() -> int:
    """Run the command of this process, whose signals are caught before anything else is imported."""
    catch_signals()
    collect_rarely()
    from megatron_bert.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
