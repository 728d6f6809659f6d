# SPDX-License-Identifier: Apache-2.0
"""Megatron-core loads converted checkpoints and computes the same losses, on the CPU.

megatron-core is not a dependency; install it into a folder of its own:

    pip install --no-deps --target core megatron-core==0.16.1
    PYTHONPATH=core python -m benchmarks.megatron_core_parity --output benchmarks/megatron_core_parity.json

A small model with random weights, large enough that every part matters, is converted to megatron-core's format at
several tensor-parallel sizes. Each rank loads its file with ``strict=True`` into BertModel (local layer specification,
gloo) and computes the loss of every token and the logits of the pair head; they are compared with this project's model
in float32. Then megatron-core's own state dictionaries are saved and read back by the converter, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import provenance, publish
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.state import CanonicalState, SourceFacts, StateTensor, pretraining_tensors
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.model.sequences import SequenceLayout
from megatron_bert.planning.this_machine import run_ranks

#: 1000 words: megatron-core's table has 1024 rows, and padding rows take part in its softmax.
CONFIG = MegatronBertConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    intermediate_size=256,
    max_position_embeddings=32,
    layer_norm_eps=1e-5,
)
BATCH, LENGTH = 6, 32


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, types, mask of real tokens and labels, ``[B, S]``."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([32, 7, 20, 32, 11, 29])
    mask = torch.arange(LENGTH) < lengths[:, None]
    tokens = torch.randint(1, CONFIG.vocab_size, (BATCH, LENGTH), generator=generator) * mask
    types = (torch.arange(LENGTH) >= lengths[:, None] // 2).long() * mask
    labels = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH), generator=generator)
    return tokens, types, mask, labels


def write_native(folder: Path) -> Path:
    """A native checkpoint with random weights."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in pretraining_tensors(CONFIG).items():
        values = torch.randn(shape, generator=generator) * 0.15 + ("norm.weight" in name)
        tensors[name] = StateTensor.held(values, name)
    facts = SourceFacts(format="native", variant="random", files=1, stored_rows=CONFIG.vocab_size)
    folder.mkdir()
    FORMATS["native"].write(CanonicalState(config=CONFIG, facts=facts, tensors=tensors), folder, WriteOptions())
    return folder


@torch.no_grad()
def our_losses(source: Path) -> tuple[Tensor, Tensor]:
    """Loss of every token ``[B, S]`` and pair logits ``[B, 2]`` of this project's model."""
    tokens, types, mask, labels = inputs()
    model = BertForPretraining(CONFIG)
    with open_checkpoint(source) as state:
        load_into(model, state)
    logits = model(
        MicroBatch(
            tokens=tokens.flatten(),
            positions=torch.arange(LENGTH).repeat(BATCH),
            types=types.flatten(),
            samples=torch.arange(BATCH).repeat_interleave(LENGTH),
            layout=SequenceLayout.rectangle(BATCH, LENGTH, mask),
            slots=torch.arange(BATCH * LENGTH),
            slot_labels=labels.flatten(),
            first_tokens=torch.arange(BATCH) * LENGTH,
            pair_labels=torch.zeros(BATCH, dtype=torch.int64),
            lengths=tuple(mask.sum(1).tolist()),
        )
    )
    assert logits.pair is not None
    words = logits.masked[:, : CONFIG.vocab_size]
    return F.cross_entropy(words, labels.flatten(), reduction="none").view(BATCH, LENGTH), logits.pair


def core_rank(rank: int, tensor: int, source: str, target: str, results: str) -> None:
    """One tensor-parallel rank of megatron-core: load strictly, compute, save its own state."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Two things in its attention want CUDA: a buffer, and the random state of a dropout that evaluation does not use.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    get_cuda_rng_tracker().fork = contextlib.nullcontext
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    config = TransformerConfig(
        num_layers=CONFIG.num_hidden_layers,
        hidden_size=CONFIG.hidden_size,
        num_attention_heads=CONFIG.num_attention_heads,
        ffn_hidden_size=CONFIG.intermediate_size,
        layernorm_epsilon=CONFIG.layer_norm_eps,
        tensor_model_parallel_size=tensor,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
    )
    path = Path(source, f"release/mp_rank_{rank:02d}/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    model = BertModel(
        config=config,
        num_tokentypes=2,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=content["args"].padded_vocab_size,
        max_sequence_length=CONFIG.max_position_embeddings,
        share_embeddings_and_output_weights=True,
    ).eval()
    own = model.state_dict()
    # Empty entries of megatron-core's own (number formats); everything else must be there, and nothing more.
    extra = {key: value for key, value in own.items() if key.endswith("_extra_state")}
    model.load_state_dict(content["model"] | extra, strict=True)
    tokens, types, mask, labels = inputs()
    with torch.no_grad():
        loss, pair = model(tokens, mask.long(), tokentype_ids=types, lm_labels=labels)
    folder = Path(target, f"release/mp_rank_{rank:02d}")
    folder.mkdir(parents=True)
    saved: dict[str, Any] = {"model": model.state_dict(), "checkpoint_version": 3.0, "args": content["args"]}
    torch.save(saved, folder / "model_optim_rng.pt")
    if rank == 0:
        torch.save((loss.float(), pair.float()), results)
    dist.barrier()
    dist.destroy_process_group()


def compare(native: Path, scratch: Path, tensor: int) -> dict[str, Any]:
    """Largest differences at one tensor-parallel size."""
    converted, saved, results = (scratch / f"{name}{tensor}" for name in ("core", "saved", "results"))
    convert(native, converted, to="megatron-core", write=WriteOptions(tensor=tensor), progress=False)
    run_ranks(tensor, core_rank, tensor, str(converted), str(saved), str(results))
    loss, pair = torch.load(results)
    expected_loss, expected_pair = our_losses(native)
    mask = inputs()[2]
    with open_checkpoint(native) as first, open_checkpoint(saved) as second:
        equal = first.keys() == second.keys() and all(
            torch.equal(tensor.load(), second[name].load()) for name, tensor in first.items()
        )
    return {
        "tensor": tensor,
        "mean_loss_megatron_core": float(loss[mask].mean()),
        "mean_loss_megatron_bert": float(expected_loss[mask].mean()),
        "largest_difference_of_token_losses": float((loss - expected_loss)[mask].abs().max()),
        "largest_difference_of_pair_logits": float((pair - expected_pair).abs().max()),
        "its_own_files_read_back_bit_for_bit": equal,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 if it fails."""
    parser = argparse.ArgumentParser(description="Compare losses with megatron-core on converted checkpoints.")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        native = write_native(Path(scratch, "native"))
        results = [compare(native, Path(scratch), tensor) for tensor in parsed.tensor]
    report = {**provenance("megatron_core_parity", "megatron-core", arguments=arguments), "results": results}
    publish(report, parsed.output)
    worst = max(r["largest_difference_of_token_losses"] for r in results)
    return 0 if worst < 1e-4 and all(r["its_own_files_read_back_bit_for_bit"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
