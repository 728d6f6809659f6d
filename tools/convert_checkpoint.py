# SPDX-License-Identifier: Apache-2.0
"""Convert a Megatron BERT checkpoint to Hugging Face files beside it.

The same converter as `megatron-bert convert`, for those who are used to the script of the Hugging Face documentation:

    python convert_checkpoint.py megatron_bert_345m_v0_1_uncased.zip

leaves config.json and model.safetensors in the folder of the archive. Options for what the archive does not say, such
as --gelu and --true-vocab-size, are those of `megatron-bert convert`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_bert.convert.commands import add_read_options, add_write_options, convert_as_told
from megatron_bert.ending import command


@command("convert_checkpoint")
def main(arguments: list[str] | None = None) -> int:
    """Run the script; 0 on success, 2 for mistakes a user can fix."""
    parser = argparse.ArgumentParser(description="Convert a Megatron BERT checkpoint to Hugging Face files beside it.")
    parser.add_argument("source", type=Path, metavar="SRC", help="a zip file, a .pt file or a folder")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder (default: that of SRC)")
    add_read_options(parser)
    add_write_options(parser)
    parsed = parser.parse_args(arguments)
    source: Path = parsed.source
    beside = source if source.is_dir() else source.parent
    convert_as_told(parsed, parsed.destination or beside, to="huggingface", beside=parsed.destination is None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
