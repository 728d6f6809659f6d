# SPDX-License-Identifier: Apache-2.0
"""A checkpoint format: numpy's archives."""

import io
import json
from pathlib import Path

import numpy as np
import torch

from megatron_bert.convert.files import FileTree
from megatron_bert.convert.options import ReadOptions, WriteOptions
from megatron_bert.convert.state import WORD_EMBEDDINGS, CanonicalState, SourceFacts, StateTensor
from megatron_bert.model.configuration import config_from_dict


class NumpyArchive:
    """Tensors by their names here, in float32, and the configuration as JSON."""

    name = "numpy"
    entries = r"weights\.npz|encoder\.json"

    def detect(self, tree: FileTree) -> bool:
        """Whether both files are there."""
        return "weights.npz" in tree and "encoder.json" in tree

    def read(self, tree: FileTree, options: ReadOptions) -> CanonicalState:
        """Open the archive."""
        del options
        archive = np.load(io.BytesIO(tree["weights.npz"].content()))
        described = json.loads(tree["encoder.json"].content())
        tensors = {
            name: StateTensor(
                archive[name].shape, torch.float32, lambda name=name: torch.from_numpy(archive[name].copy()), name
            )
            for name in archive.files
        }
        facts = SourceFacts(format=self.name, variant="npz", files=1, stored_rows=tensors[WORD_EMBEDDINGS].shape[0])
        config = config_from_dict(described["config"], tree.label)
        return CanonicalState(config=config, facts=facts, tensors=tensors, head=described["head"])

    def write(self, state: CanonicalState, target: Path, options: WriteOptions) -> None:
        """Write both files."""
        del options
        np.savez(target / "weights.npz", **{name: tensor.load().float().numpy() for name, tensor in state.items()})
        described = {"config": state.config.to_dict(), "head": state.head}
        (target / "encoder.json").write_text(json.dumps(described), encoding="utf-8")
