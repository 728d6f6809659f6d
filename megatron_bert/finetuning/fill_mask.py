# SPDX-License-Identifier: Apache-2.0
"""Guess masked words with a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from megatron_bert.convert.opening import load_into, open_checkpoint
from megatron_bert.convert.options import ReadOptions
from megatron_bert.convert.tokenizer_files import check_vocabulary, find_vocabulary
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.ibert.stored_ranges import use_ranges
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import BertForPretraining
from parallel.errors import UserError


@dataclass(frozen=True)
class Guess:
    """One guess for a masked word.

    Attributes:
        sentence: the text with the guess in place.
    """

    token: str
    probability: float
    sentence: str


class FillMask:
    """A pretrained model that fills in masked words."""

    def __init__(self, model: BertForPretraining, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mask_token = tokenizer.id_to_token(tokenizer.mask_id)

    @classmethod
    def from_checkpoint(cls, path: Path, tokenizer: Path | None = None, options: ReadOptions | None = None) -> Self:
        """Load a model with a masked-language head.

        Args:
            path: a run directory, or a checkpoint of any format.
            tokenizer: its vocabulary, where none lies beside it.
            options: what the checkpoint does not say.

        Raises:
            UserError: it is none, has no such head, or its vocabulary is not known or not its own.
        """
        with open_checkpoint(path, options or ReadOptions()) as state:
            if not state.has_masked_head:
                raise UserError(f"{state.label} has no masked-language head: give a pretrained model with one")
            vocabulary = find_vocabulary(
                path, tokenizer, run_state=state.run_state, remedy="give --tokenizer, the one of its training"
            )
            check_vocabulary(state, vocabulary)
            model = BertForPretraining(replace(state.config, binary_head=False))
            load_into(model, state)
            if state.ranges is not None:
                use_ranges(model, state.ranges, state.label)
        return cls(model.eval(), vocabulary)

    @torch.no_grad()
    def __call__(self, text: str, top: int = 5) -> list[Guess]:
        """The ``top`` guesses for each mask in the text, masks in order and the most likely guess first.

        Raises:
            UserError: the text holds no mask, or is longer than the model takes.
        """
        ids = self.encode(text)
        tokens = torch.tensor(ids)
        masks = (tokens == self.tokenizer.mask_id).nonzero().squeeze(1)
        batch = MicroBatch.of_one(tokens, masks)
        # Of all words, as transformers' pipeline has them, though special tokens are not guessed.
        chances = self.model(batch).masked[:, : self.model.config.vocab_size].float().softmax(dim=1)
        chances = chances[:, : self.tokenizer.vocab_size]
        chances[:, list(self.tokenizer.special_ids)] = -1.0
        best = chances.topk(min(top, chances.shape[1] - len(self.tokenizer.special_ids)), dim=1)
        return [
            self._guess(ids, int(mask), int(token), float(probability))
            for mask, row, values in zip(masks, best.indices, best.values, strict=True)
            for token, probability in zip(row, values, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with masks, as the model takes it, or else UserError."""
        pieces = text.split(self.mask_token)
        if len(pieces) < 2:
            raise UserError(f"{text!r} holds no {self.mask_token}: put one for each word to guess")
        ids = [self.tokenizer.cls_id]
        for number, piece in enumerate(pieces):
            ids += [self.tokenizer.mask_id] if number else []
            before_mask = self.tokenizer.mask_takes_space and number < len(pieces) - 1
            ids += self.tokenizer.encode(piece.rstrip(" ") if before_mask else piece)
        ids.append(self.tokenizer.sep_id)
        longest = self.model.config.longest_sequence
        if len(ids) > longest:
            raise UserError(f"the text has {len(ids)} tokens, but the model takes {longest}: shorten it")
        return ids

    def _guess(self, ids: list[int], place: int, token: int, probability: float) -> Guess:
        filled = [token if index == place else i for index, i in enumerate(ids)][1:-1]
        return Guess(self.tokenizer.id_to_token(token), probability, self.tokenizer.decode(filled))
