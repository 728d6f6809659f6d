"""Guess masked words with a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from megatron_bert.config import Settings
from megatron_bert.config_file import settings_from
from megatron_bert.convert.finite import check_finite
from megatron_bert.convert.opening import check_place
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_of_run
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.model.sequences import SequenceLayout
from parallel.checkpoint import checkpoint_step, latest_checkpoint, read_state
from parallel.checkpoint_reader import load_tensors
from parallel.cross_entropy import IGNORED
from parallel.errors import UserError


@dataclass(frozen=True)
class Guess:
    """One guess for a masked word.

    Attributes:
        token: the token guessed.
        probability: the model's probability for it.
        sentence: the text with the guess in place.
    """

    token: str
    probability: float
    sentence: str


class FillMask:
    """A pretrained model that fills in masked words.

    Args:
        model: with its weights.
        tokenizer: it was trained with.
    """

    def __init__(self, model: BertForPretraining, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mask_token = tokenizer.id_to_token(tokenizer.mask_id)

    @classmethod
    def from_checkpoint(cls, path: Path) -> Self:
        """Load a checkpoint, or the newest one of a run directory.

        Raises:
            UserError: there is none.
        """
        checkpoint = path if checkpoint_step(path) is not None else latest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            check_place(path)
            raise UserError(
                f"{path} is neither a run directory with a whole checkpoint nor a checkpoint: train one first"
            )
        state = read_state(checkpoint)
        if "settings" not in state:
            raise UserError(
                f"{checkpoint} does not name the tokenizer of its model, as checkpoints of a training run do: start a "
                "run from it with model.from, and give that run"
            )
        settings: Settings = settings_from(state["settings"], source=str(checkpoint))
        copy, wanted = tokenizer_of_run(checkpoint), settings.tokenizer
        tokenizer = load_tokenizer(wanted.path, lowercase=wanted.lowercase) if copy is None else load_tokenizer(copy)
        if state.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{checkpoint} was trained with another vocabulary than that in {copy or wanted.path}: put the "
                "tokenizer of the run back there"
            )
        config = settings.model_config_for(tokenizer.vocab_size, tokenizer.pad_id)
        model = BertForPretraining(config)
        with torch.no_grad():
            load_tensors(checkpoint, {f"model.{name}": p for name, p in model.named_parameters()})
        for name, parameter in model.named_parameters():
            check_finite(parameter, f"{name} of {checkpoint}")
        return cls(model, tokenizer)

    @torch.no_grad()
    def __call__(self, text: str, top: int = 5) -> list[Guess]:
        """The ``top`` guesses for each mask in the text, masks in order and the most likely guess first.

        Raises:
            UserError: the text holds no mask, or is longer than the model takes.
        """
        pieces = text.split(self.mask_token)
        if len(pieces) < 2:
            raise UserError(f"{text!r} holds no {self.mask_token}: put one for each word to guess")
        ids = [self.tokenizer.cls_id]
        for number, piece in enumerate(pieces):
            ids += [self.tokenizer.mask_id] if number else []
            ids += self.tokenizer.encode(piece)
        ids.append(self.tokenizer.sep_id)
        longest = self.model.config.max_position_embeddings
        if len(ids) > longest:
            raise UserError(f"the text has {len(ids)} tokens, but the model takes {longest}: shorten it")
        tokens = torch.tensor(ids)
        masks = (tokens == self.tokenizer.mask_id).nonzero().squeeze(1)
        logits = self.model(_one_sequence(tokens, masks)).masked[:, : self.tokenizer.vocab_size]
        logits[:, list(self.tokenizer.special_ids)] = -torch.inf
        best = logits.float().softmax(dim=1).topk(min(top, self.tokenizer.vocab_size), dim=1)
        return [
            self._guess(ids, int(mask), int(token), float(probability))
            for mask, row, chances in zip(masks, best.indices, best.values, strict=True)
            for token, probability in zip(row, chances, strict=True)
        ]

    def _guess(self, ids: list[int], place: int, token: int, probability: float) -> Guess:
        filled = [token if index == place else i for index, i in enumerate(ids)][1:-1]
        return Guess(self.tokenizer.id_to_token(token), probability, self.tokenizer.decode(filled))


def _one_sequence(tokens: torch.Tensor, slots: torch.Tensor) -> MicroBatch:
    count = tokens.shape[0]
    zeros = torch.zeros(count, dtype=torch.int64)
    return MicroBatch(
        tokens=tokens,
        positions=torch.arange(count),
        types=zeros,
        samples=zeros,
        layout=SequenceLayout.rectangle(1, count),
        slots=slots,
        slot_labels=torch.full_like(slots, IGNORED),
        first_tokens=torch.zeros(1, dtype=torch.int64),
        pair_labels=torch.full((1,), IGNORED),
        lengths=(count,),
    )
