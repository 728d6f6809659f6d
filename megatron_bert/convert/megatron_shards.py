# SPDX-License-Identifier: Apache-2.0
"""Finds the files of a Megatron checkpoint and checks that they are all there and belong together."""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_bert.convert.divisions import check_version
from megatron_bert.convert.files import FileTree
from megatron_bert.convert.nemo import NEMO_WEIGHTS, nemo_settings
from megatron_bert.convert.state import StateTensor
from parallel.errors import UserError, brief, its_class
from parallel.stored.stored_tensor import StoredTensor
from parallel.stored.torch_files import is_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
#: DeepSpeed's, which holds the name of a folder.
_DEEPSPEED_TRACKER = "latest"
#: Where a shard lies: as Megatron-LM, NeMo and DeepSpeed have it.
_SHARDS = tuple(
    re.compile(r"(?P<folder>(?:.*/)?)" + name)
    for name in (
        r"mp_rank_(?P<tensor>\d{2,4})(?:_(?P<stage>\d{3}))?(?P<expert>_\d{3})?/(?:model_optim_rng|model_rng)\.pt",
        r"(?:mp|tp)_rank_(?P<tensor>\d{2,4})(?:_pp_rank_(?P<stage>\d{3}))?(?P<expert>_ep_rank_\d+)?/model_weights\.ckpt",
        r"mp_rank_(?P<tensor>\d{2,4})(?P<stage>)(?P<expert>)_model_states\.pt",
    )
)
_TORCH_ENDINGS = (".pt", ".pth", ".ckpt")
#: Names of a shard that lies alone, without the folder of its rank.
_LONE = ("model_optim_rng.pt", "model_rng.pt", NEMO_WEIGHTS)
#: Files that frameworks leave beside the weights, with the state of the optimizer, of random numbers or of the run.
_BESIDE = re.compile(
    r"(?:.*/)?(?:distrib_optim|optim|optimizer|scheduler|scaler|rng_state\w*|training_args|common|\w+_optim_states)\.\w+"
)
_CORE = (
    "a megatron-core checkpoint of the {} kind: convert it to the torch kind first, with Megatron-LM's "
    "--ckpt-convert-format torch --ckpt-convert-save DIRECTORY"
)
#: Names of files that give a packaging away together, and what to tell the user.
_NOT_READ: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"common\.pt", r"\.metadata"), _CORE.format("torch_dist")),
    ((r"common\.pt", r"\.zarray"), _CORE.format("zarr")),
    (
        (r"layer_\d+-model_\d+-model_states\.pt",),
        "a checkpoint of DeepSpeed's pipeline engine, with a file for each layer: merge it first, with "
        "tools/convert_checkpoint/deepspeed_to_megatron.py of Megatron-DeepSpeed",
    ),
    (
        (r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt",),
        "a checkpoint of DeepSpeed's ZeRO stage 3, whose weights lie in pieces: merge them first, with the "
        "zero_to_fp32.py in its folder, and give the file that this writes",
    ),
    (("pickle", "storages", "tensors"), "a file of torch before 0.1.10: load and save it with torch 0.4 first"),
)
#: Under which a model lies: Megatron's, DeepSpeed's and Lightning's.
MODEL_KEYS = ("model", "module", "state_dict")
#: Entries of a model's nested dictionaries, and how deep they nest; real ones have a few thousand and four.
_MOST_KEYS, _DEEPEST = 200_000, 8


@dataclass(frozen=True)
class Shard:
    """One file: what one (tensor rank, stage) saved."""

    label: str
    content: dict[Any, Any]

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the run that wrote it; empty where they were not saved."""
        args = self.content.get("args")
        if isinstance(args, dict):  # of scripts that save vars(args)
            return {key: value for key, value in args.items() if isinstance(key, str)}
        return vars(args) if isinstance(args, argparse.Namespace) else {}

    @property
    def version(self) -> float | None:
        """The checkpoint version; None when the file declares none.

        Raises:
            UserError: what it declares is not a number.
        """
        value = self.content.get("checkpoint_version")
        if isinstance(value, StoredTensor) and math.prod(value.shape) == 1:
            value = value.load().item()
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(
                f"{self.label} has a checkpoint version that is not a number ({its_class(value)}): give the "
                "order of its rows with --source-checkpoint-version, 0, 1.0, 2.0 or 3.0"
            )
        return value

    @cached_property
    def chunks(self) -> list[dict[str, StateTensor]]:
        """The tensors of the model, or of its chunks under virtual pipeline stages.

        Raises:
            UserError: there is none.
        """
        numbered = (f"model{number}" for number in itertools.count())
        keys = list(itertools.takewhile(self.content.__contains__, numbered))
        keys = keys or [key for key in MODEL_KEYS if key in self.content][:1]
        found = [self.content[key] for key in keys] or [self.content]  # a bare state dictionary
        if not all(isinstance(chunk, dict) for chunk in found):
            raise UserError(f"{self.label} holds no model where it should be (key {keys[0]!r}): wrong file?")
        return [self._flat(chunk) for chunk in found]

    def _flat(self, chunk: dict[Any, Any]) -> dict[str, StateTensor]:
        """The tensors of nested dictionaries under dotted names.

        Raises:
            UserError: they nest strangely, or hold something that is not a tensor.
        """
        found: dict[str, StateTensor] = {}
        entries = itertools.count()

        def walk(prefix: str, value: Any, depth: int) -> None:
            if prefix.endswith("_extra_state"):
                return  # Transformer Engine's, about number formats that are not used here
            if next(entries) >= _MOST_KEYS or depth > _DEEPEST:
                raise UserError(f"{self.label} nests its tensors without end: it is damaged or made to mislead")
            if isinstance(value, StoredTensor):
                found[prefix] = StateTensor(value.shape, value.dtype, value.load, f"{self.label}: {prefix}")
            elif isinstance(value, dict):
                for key, inner in value.items():
                    if not isinstance(key, str):
                        raise UserError(f"{self.label} holds a model with a key that is not text: it is damaged")
                    walk(f"{prefix}.{key}" if prefix else key, inner, depth + 1)
            else:
                held = f"{brief(prefix or 'a model')}, {its_class(value)}"
                raise UserError(f"{self.label} holds {held}: expected tensors")

        walk("", chunk, 0)
        return found


def locate(tree: FileTree) -> dict[tuple[int, int], str]:
    """(tensor rank, stage) -> name, for the shards of a Megatron checkpoint; empty when there is none.

    Raises:
        UserError: several checkpoints are there and none is named as the newest, or shards are missing.
    """
    _refuse_packaging(tree)
    groups = shard_groups(tree)
    if not groups:  # a bare file, or the one checkpoint file of a folder or archive
        candidates = weight_files(tree)
        return {(0, 0): candidates[0]} if len(candidates) == 1 and is_torch_file(tree[candidates[0]]) else {}
    folder = next(iter(groups)) if len(groups) == 1 else _tracked(tree, groups)
    shards = groups[folder]
    ranks, stages = (1 + max(place[axis] for place in shards) for axis in (0, 1))
    # One more than the largest number seen: larger gaps are found from the sizes in the files.
    missing = next(((t, p) for p in range(stages) for t in range(ranks) if (t, p) not in shards), None)
    if missing is not None:
        name = f"mp_rank_{missing[0]:02d}" + (f"_{missing[1]:03d}" if stages > 1 else "")
        raise UserError(
            f"{tree.label} lacks {folder}{name}/model_optim_rng.pt, a shard of tensor size {ranks} x pipeline size "
            f"{stages}: copy all folders of the checkpoint"
        )
    return shards


def _refuse_packaging(tree: FileTree) -> None:
    """Refuse a tree in a packaging that is known but not read (UserError), with its name and what to do."""
    names = {name.rpartition("/")[2] for name in tree}
    for patterns, text in _NOT_READ:
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            raise UserError(f"{tree.label} is {text}")


def shard_groups(tree: FileTree) -> dict[str, dict[tuple[int, int], str]]:
    """Folder -> (tensor rank, stage) -> name, for all folders of shards in a tree.

    Raises:
        UserError: they are of a mixture of experts.
    """
    groups: dict[str, dict[tuple[int, int], str]] = {}
    for name in tree:
        match = next(filter(None, (shard.fullmatch(name) for shard in _SHARDS)), None)
        if match is None:
            continue
        if match["expert"]:
            raise UserError(f"{tree.label} holds {name}, of a mixture of experts: BERT models have none")
        place = (int(match["tensor"]), int(match["stage"] or 0))
        groups.setdefault(match["folder"], {})[place] = name
    return groups


def weight_files(tree: FileTree) -> list[str]:
    """The files of a tree that may hold a model by their names, for a tree without folders of ranks."""
    names = [name for name in tree if name.endswith(_TORCH_ENDINGS) and not _BESIDE.fullmatch(name)]
    known = [name for name in names if name.rpartition("/")[2] in _LONE]
    return known if len(known) == 1 else names or (list(tree) if len(tree) == 1 else [])


def _tracked(tree: FileTree, groups: Mapping[str, Any]) -> str:
    found = brief(", ".join(sorted(groups)), 200)
    trackers = [name for name in tree if name.rpartition("/")[2] in (TRACKER, _DEEPSPEED_TRACKER)]
    if len(trackers) != 1:
        raise UserError(f"{tree.label} holds several checkpoints ({found}): name the folder of one of them")
    text = tree[trackers[0]].content(64).decode("latin-1").strip()
    root, _, kind = trackers[0].rpartition("/")
    folder = text if kind == _DEEPSPEED_TRACKER or text == "release" else f"iter_{text:0>7}"
    wanted = f"{root}/{folder}/" if root else f"{folder}/"
    if wanted not in groups:
        raise UserError(
            f"{trackers[0]} in {tree.label} names {brief(folder)!r}, which is not there (there are {found}): "
            "name the folder of one of them"
        )
    return wanted


@dataclass(frozen=True)
class Checkpoint:
    """All shards of a Megatron checkpoint, opened but with their tensors unread.

    Attributes:
        shards: ``[stage][tensor rank]``.
        version: given by the user or declared by the files; None when neither says it.
        iteration: training step, or None.
    """

    shards: list[list[Shard]]
    version: float | None
    iteration: int | None

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return len(self.shards[0])

    @property
    def pipeline(self) -> int:
        """Pipeline-parallel size."""
        return len(self.shards)

    @property
    def first(self) -> Shard:
        """The shard of tensor rank 0 and stage 0, which speaks for the others."""
        return self.shards[0][0]

    def pieces(self) -> Iterator[list[tuple[Shard, dict[str, StateTensor]]]]:
        """Pieces of the stack from the bottom up, each with one chunk a tensor rank.

        Raises:
            UserError: files hold different numbers of them.
        """
        count = len(self.first.chunks)
        for shard in itertools.chain(*self.shards):
            if len(shard.chunks) != count:
                raise UserError(
                    f"{shard.label} holds {len(shard.chunks)} virtual stages, but {self.first.label} holds {count}: "
                    "the folder mixes two checkpoints"
                )
        for chunk in range(count):
            for row in self.shards:
                yield [(shard, shard.chunks[chunk]) for shard in row]


def open_shards(tree: FileTree, version: float | None = None) -> Checkpoint:
    """Open the files found by :func:`locate`.

    Args:
        tree: with the files.
        version: checkpoint version by the user's word, whatever the files declare; None takes theirs.

    Raises:
        UserError: one is damaged, or they do not belong together.
    """
    places, settings = locate(tree), nemo_settings(tree)
    ranks, stages = (1 + max(place[axis] for place in places) for axis in (0, 1))
    shards = [[_open(tree, places[tensor, stage], settings) for tensor in range(ranks)] for stage in range(stages)]
    every = [shard for row in shards for shard in row]
    if version is None:
        version = _agreed("checkpoint_version", every, lambda s: s.version)
    iteration = _agreed("iteration", every, lambda s: s.content.get("iteration", s.content.get("total_iters")))
    for key in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size"):
        _agreed(key, every, lambda s, key=key: s.args.get(key))
    _check_sizes(every[0], ranks, stages)
    if version is not None:
        version = check_version(version, every[0].label)
    counted = isinstance(iteration, int) and 0 <= iteration < 1 << 62
    return Checkpoint(shards, version, iteration if counted else None)


def first_keys(tree: FileTree) -> list[str]:
    """Keys of the tensors in the first shard of a tree; none where there are no shards."""
    places = locate(tree)
    return list(_open(tree, places[0, 0]).chunks[0]) if (0, 0) in places else []


def _open(tree: FileTree, name: str, settings: dict[str, Any] | None = None) -> Shard:
    """Open a file; ``settings`` are what others say of it, for one that holds a state dictionary only."""
    content = tree.structure(name)
    label = tree[name].label
    if not isinstance(content, dict):
        raise UserError(f"{label} holds {its_class(content)} instead of a dictionary: give a checkpoint")
    if settings is not None:
        content = {"model": content.get("state_dict", content)} | settings
    return Shard(label, content)


def _agreed(what: str, shards: list[Shard], read: Any) -> Any:
    """A value that all shards must share; plain values only, others count as none."""

    def plain(shard: Shard) -> Any:
        value = read(shard)
        return value if isinstance(value, (int, float, str)) else None

    first = plain(shards[0])
    for shard in shards[1:]:
        if plain(shard) != first:
            raise UserError(
                f"{shard.label} has {what} {brief(plain(shard))}, but {shards[0].label} has {brief(first)}: "
                "the folder mixes two checkpoints"
            )
    return first


def _check_sizes(shard: Shard, ranks: int, stages: int) -> None:
    args = shard.args
    for found, keys, what in (
        (ranks, ("tensor_model_parallel_size", "model_parallel_size"), "tensor"),
        (stages, ("pipeline_model_parallel_size",), "pipeline"),
    ):
        said = next((args[key] for key in keys if isinstance(args.get(key), int)), None)
        if said is not None and said != found:
            raise UserError(
                f"{shard.label} was saved at {what} size {brief(said)}, but there are files of {found}: "
                "give the folder that holds all mp_rank_... folders of the checkpoint"
            )
