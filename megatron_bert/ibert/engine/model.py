# SPDX-License-Identifier: Apache-2.0
"""A model that computes in integers from token ids to logits.

Shapes: B sequences, S tokens of each, T tokens end to end, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from megatron_bert.ibert.bounds import LOGIT_BITS, MOST_KEYS, TANH_BITS
from megatron_bert.ibert.engine.answer import Answer
from megatron_bert.ibert.engine.arguments import check_lengths, check_threads
from megatron_bert.ibert.engine.backend import Backend, Executable, HeadName
from megatron_bert.ibert.engine.backends import backend_by_name
from megatron_bert.ibert.engine.place import plan_path
from megatron_bert.ibert.engine.plan import Plan, plan_heads
from megatron_bert.ibert.engine.plan_file import read_plan, read_shapes, write_plan
from megatron_bert.model.configuration import config_from_dict
from megatron_bert.model.task_heads.kind import HeadKind
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import UserError, brief, its_class
from parallel.whole_files import reporting


class Packed(NamedTuple):
    """Sequences end to end, checked.

    Attributes:
        tokens, positions, types: int32 ``[T]``.
        starts: int32 ``[B + 1]``.
    """

    tokens: Tensor
    positions: Tensor
    types: Tensor
    starts: Tensor

    @property
    def first(self) -> Tensor:
        """Where each sequence begins, int64 ``[B]``."""
        return self.starts[:-1].long()


class IntegerModel:
    """A quantized model, run in integers by a backend; all backends give the same bits.

    Args:
        plan: of the model.
        backend: ``auto`` (the fastest that runs here), ``reference``, ``cpu``, ``cuda``, whose results
            are on the GPU.
        threads: to use; None leaves it to the backend.

    Attributes:
        plan: see above; of a model that was loaded without the values that the backend has packed.
        config: of the model.
        backend: name of the backend.
    """

    def __init__(self, plan: Plan, backend: str = "auto", threads: int | None = None) -> None:
        chosen = _backend(backend, threads)
        self._take(plan, chosen, chosen.prepare(plan, threads))

    def _take(self, plan: Plan, backend: Backend, executable: Executable, stored: Path | None = None) -> None:
        self.plan, self.backend = plan, backend.name
        self.config = config_from_dict(plan.config, "the plan")
        self._executable = executable
        #: Where the plan's values are, if they are held by the backend alone.
        self._stored = stored

    @classmethod
    def from_pretrained(cls, path: str | Path, backend: str = "auto", threads: int | None = None) -> Self:
        """Load a plan.

        Args:
            path: its file, the directory of a quantized model, or the run that made it.
            backend, threads: see the class.

        Raises:
            UserError: there is no plan, or it is damaged.
        """
        place, chosen = plan_path(Path(path)), _backend(backend, threads)
        model = cls.__new__(cls)
        if chosen.prepare_file is None:
            plan = read_plan(place)
            model._take(plan, chosen, chosen.prepare(plan, threads))
        else:
            model._take(read_shapes(place), chosen, chosen.prepare_file(place, threads), place)
        return model

    @classmethod
    def from_model(cls, model: nn.Module, backend: str = "auto", threads: int | None = None) -> Self:
        """Compile a quantized model; see :func:`~megatron_bert.ibert.engine.parts.plan_of`."""
        from megatron_bert.ibert.engine.parts import plan_of  # what a finished plan needs nothing of

        return cls(plan_of(model), backend, threads)

    def save(self, path: str | Path) -> None:
        """Write the plan as a file.

        Raises:
            UserError: it cannot be written there.
        """
        plan = self.plan if self._stored is None else read_plan(self._stored)
        with reporting("written", path, "give another file"):
            write_plan(plan, path)

    # ---------------------------------------------------------------- tensors

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Answer:
        """What the float model's class returns, in float32, without what asks for gradients or inner tensors.

        Tokens that the mask leaves out cost nothing; their results are 0.

        Args:
            input_ids: integers ``[B, S]``, of a choice ``[B, choices, S]``.
            attention_mask: 1 for tokens that count; all do by default.
            token_type_ids, position_ids: as of the float classes.

        Raises:
            UserError: ids out of range, shapes that do not fit, or sequences that are empty or too long.
        """
        _integers(input_ids, "input_ids")
        for name, given in (
            ("attention_mask", attention_mask),
            ("token_type_ids", token_type_ids),
            ("position_ids", position_ids),
        ):
            if given is not None and not isinstance(given, Tensor):
                raise UserError(f"{name} is {its_class(given)}: give a tensor")
        input_ids = input_ids.long()  # unsigned ones know few operators
        if self.plan.task in HEADS and HEADS[self.plan.task].grouped:
            return self._groups(input_ids, attention_mask, token_type_ids, position_ids)
        packed, kept, shape = self._packed(input_ids, attention_mask, token_type_ids, position_ids)
        return self._answer(self.encode(packed), packed, kept, shape)

    def encode(self, packed: Packed) -> Tensor:
        """The final stream, int16 ``[T, H]`` of scale 2^-``plan.hidden_exponent``."""
        return self._executable.encode(*packed)

    def head(self, name: HeadName, rows: Tensor) -> Tensor:
        """Logits of rows of the stream as float32; see :class:`~megatron_bert.ibert.engine.backend.Executable`."""
        if name in ("classifier", "pair") and self._pooled:
            rows = self._executable.head("pooler", rows)
        return self._executable.head(name, rows).float() * 2.0 ** -(TANH_BITS if name == "pooler" else LOGIT_BITS)

    def pack(self, tokens: Tensor, positions: Tensor, types: Tensor, lengths: Sequence[int]) -> Packed:
        """Check sequences that stand end to end.

        Args:
            tokens, positions, types: integers ``[T]``; positions are rows of the table.
            lengths: of the sequences.

        Raises:
            UserError: something is out of range.
        """
        tables = self.plan.embeddings
        check_lengths(lengths)
        if max(lengths) > min(self.plan.longest, MOST_KEYS):
            raise UserError(
                f"a sequence has {max(lengths)} tokens, but the model takes {self.plan.longest}: cut or divide it"
            )
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = Packed(
            _in_table(tokens, tables.word.shape[0], "input_ids"),
            _in_table(positions, tables.position.shape[0], "position_ids"),
            _in_table(types, tables.token_type.shape[0], "token_type_ids"),
            starts,
        )
        if not all(values.shape == (int(starts[-1]),) for values in packed[:3]):
            raise UserError(f"the sequences have {int(starts[-1])} tokens, but the batch holds another number")
        return packed

    # ---------------------------------------------------------------- rectangles

    @property
    def _pooled(self) -> bool:
        return self.plan.heads.pooler is not None and self.plan.task != "encoder"

    def _packed(
        self, ids: Tensor, mask: Tensor | None, types: Tensor | None, positions: Tensor | None
    ) -> tuple[Packed, Tensor, tuple[int, int]]:
        """The tokens that count, where they stand in the rectangle, and its shape."""
        if ids.dim() != 2 or 0 in ids.shape:
            raise UserError(f"input_ids has the shape {list(ids.shape)}: give sequences of tokens, [B, S]")
        shape = (ids.shape[0], ids.shape[1])
        for name, given in (("attention_mask", mask), ("token_type_ids", types), ("position_ids", positions)):
            if given is not None and given.shape != shape and (name != "position_ids" or given.shape != (1, shape[1])):
                raise UserError(f"{name} has the shape {list(given.shape)}, but input_ids {list(shape)}: give the same")
        real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu() != 0
        lengths = real.sum(1).tolist()
        if min(lengths) < 1:
            raise UserError(f"attention_mask leaves nothing of sequence {lengths.index(0)}: give it a token at least")
        if plan_heads(self.plan.task).by_sequence and not bool(real[:, 0].all()):
            raise UserError("attention_mask leaves out a first token, which the answer is made of: pad on the right")
        if positions is None:
            positions = self._positions(ids.cpu())
        types = torch.zeros_like(ids) if types is None else types
        kept = real.flatten().nonzero()[:, 0]
        flat, places, kinds = (each.cpu().expand(shape).flatten()[kept] for each in (ids, positions, types))
        return self.pack(flat, places, kinds, lengths), kept, shape

    def _positions(self, ids: Tensor) -> Tensor:
        """Rows of the position table: by place, or as of RoBERTa by the number of real tokens before it."""
        if self.plan.embeddings.first_position == 0:
            return torch.arange(ids.shape[1]).expand(ids.shape)
        padding = self.plan.embeddings.first_position - 1
        real = (ids != padding).long()
        return real.cumsum(1) * real + padding

    def _answer(self, hidden: Tensor, packed: Packed, kept: Tensor, shape: tuple[int, int]) -> Answer:
        def rectangle(values: Tensor) -> Tensor:
            if len(kept) == shape[0] * shape[1]:
                return values.unflatten(0, shape)
            filled = values.new_zeros((shape[0] * shape[1], *values.shape[1:]))
            return filled.index_copy_(0, kept.to(values.device), values).unflatten(0, shape)

        task, heads, first = self.plan.task, self.plan.heads, packed.first
        if task == "encoder":
            pooled = None if heads.pooler is None else self.head("pooler", hidden[first])
            states = rectangle(self.plan.hidden_values(hidden))
            return Answer(last_hidden_state=states, pooler_output=pooled)
        if task in HEADS:
            by_sequence = HEADS[task].by_sequence
            logits = self.head("classifier", hidden[first] if by_sequence else hidden)
            return _task_answer(HEADS[task], logits if by_sequence else rectangle(logits))
        if task == "pair":
            return Answer(logits=self.head("pair", hidden[first]))
        words = rectangle(self.head("masked", hidden))
        if task == "masked":
            return Answer(logits=words)
        pair = None if heads.pair is None else self.head("pair", hidden[first])
        return Answer(prediction_logits=words, seq_relationship_logits=pair)

    def _groups(self, ids: Tensor, *others: Tensor | None) -> Answer:
        if ids.dim() != 3:
            raise UserError(f"input_ids has the shape {list(ids.shape)}: give choices of sequences, [B, choices, S]")
        flat = [None if each is None else each.flatten(0, 1) for each in (ids, *others)]
        assert flat[0] is not None
        packed, *_ = self._packed(flat[0], *flat[1:])
        logits = self.head("classifier", self.encode(packed)[packed.first])
        return _task_answer(HEADS[self.plan.task], logits.view(ids.shape[:2]))


def _task_answer(kind: HeadKind, logits: Tensor) -> Answer:
    columns = [logits] if len(kind.results) == 1 else [column.contiguous() for column in logits.unbind(-1)]
    return Answer(**dict(zip(kind.results, columns, strict=True)))


def _backend(name: str, threads: int | None) -> Backend:
    if threads is not None:
        check_threads(threads)
    return backend_by_name(name, warn=lambda text: print(text, file=sys.stderr))


def _integers(values: Tensor, name: str) -> None:
    if (
        not isinstance(values, Tensor)
        or values.is_floating_point()
        or values.is_complex()
        or values.dtype == torch.bool
    ):
        raise UserError(f"{name} is {brief(values)}: give a tensor of integers")


def _in_table(values: Tensor, rows: int, name: str) -> Tensor:
    """Numbers of rows as int32.

    Raises:
        UserError: they are none.
    """
    _integers(values, name)
    if values.numel():
        least, most = values.aminmax()
        if int(least) < 0 or int(most) >= rows:
            wrong = int(least) if int(least) < 0 else int(most)
            raise UserError(f"{name} has {wrong}, but the model's go from 0 to {rows - 1}")
    return values.to("cpu", torch.int32)
