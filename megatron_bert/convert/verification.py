# SPDX-License-Identifier: Apache-2.0
"""Masked-language predictions with a converted model: the proof that it still knows its language."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert.convert.opening import load_into
from megatron_bert.convert.plausibility import ORDERS, reread
from megatron_bert.convert.state import CanonicalState
from megatron_bert.data.tokenizers import Tokenizer
from megatron_bert.model.batch import MicroBatch
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.pretraining import BertForPretraining
from parallel.errors import UserError

SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "She opened the door of the house and walked into the kitchen.",
    "In the morning the children go to school, and in the evening they come home.",
    "The president of the United States lives in the White House.",
    "He was born in London in the year of the great fire.",
    "The doctor told the patient to take the medicine three times per day.",
    "Water is made of hydrogen and oxygen.",
    "They played the game until it was too dark to see the ball.",
)
#: Every so many-th token is predicted, starting at the second.
_EVERY = 6
#: Tokens of a text that are used.
_LONGEST = 128


@dataclass(frozen=True)
class Verification:
    """Mean losses of masked tokens, in nats.

    Attributes:
        chance: loss of a guess among all words.
        other_orders: loss with query, key and value rows read in the order of another checkpoint version.
        example: a text with its masks, and what the model put there.
    """

    loss: float
    predictions: int
    chance: float
    other_orders: dict[float, float]
    example: str

    @property
    def verdict(self) -> str:
        """What the losses mean, in words."""
        better = [order for order, loss in self.other_orders.items() if loss < self.loss - 0.5]
        if better:
            return f"warning: the rows fit better as checkpoint version {better[0]:g}: they were probably read wrongly"
        if self.loss > self.chance - 1:
            return "warning: the model guesses no better than at random: it is untrained, or of another vocabulary"
        return "the model knows this language"

    def __str__(self) -> str:
        others = ", ".join(f"{loss:.2f} as version {order:g}" for order, loss in self.other_orders.items())
        return (
            f"masked-language loss {self.loss:.2f} over {self.predictions} tokens (chance {self.chance:.2f}"
            + (f"; with rows in other orders: {others}" if others else "")
            + f")\n  {self.example}\n{self.verdict}"
        )


@torch.no_grad()
def verify(state: CanonicalState, tokenizer: Tokenizer, texts: Path | bool = True) -> Verification:
    """Predict masked tokens, with the rows as they were read and as other versions would have them.

    Args:
        texts: a file with a text on each line, or True for built-in English sentences.

    Raises:
        UserError: the model has no such head, or the file holds no text.
    """
    if not state.has_masked_head:
        raise UserError("--verify predicts masked words, but the source has no masked-language head: leave it out")
    lines = _lines(texts) if isinstance(texts, Path) else SENTENCES
    batches = [batch for line in lines if (batch := _masked(line, tokenizer, state.config)) is not None]
    if not batches:
        raise UserError(f"{texts} holds no text long enough to mask words in: give sentences, one on each line")
    model = BertForPretraining(state.config)
    load_into(model, state)
    loss = _mean_loss(model, batches)
    example = _example(model, batches[0], tokenizer)
    others = {}
    version = state.facts.checkpoint_version
    if version is not None:
        own = 3.0 if version == 2.0 else version
        for order in ORDERS:
            if order != own:
                _reorder(model, state, own, order)
                others[order] = _mean_loss(model, batches)
                _reorder(model, state, order, own)
    return Verification(loss, sum(len(b.slots) for b in batches), math.log(state.config.vocab_size), others, example)


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verify {path} cannot be read as text ({error}): give sentences, one on each line") from None


def _masked(text: str, tokenizer: Tokenizer, config: MegatronBertConfig) -> MicroBatch | None:
    """One text with some tokens masked; None if it is too short."""
    longest = min(_LONGEST, config.longest_sequence)
    tokens = torch.tensor([tokenizer.cls_id, *tokenizer.encode(text)[: longest - 2], tokenizer.sep_id])
    slots = torch.arange(2, len(tokens) - 1, _EVERY)
    if len(slots) == 0:
        return None
    labels = tokens[slots].clone()
    tokens[slots] = tokenizer.mask_id
    return MicroBatch.of_one(tokens, slots, labels)


def _logits(model: BertForPretraining, batch: MicroBatch) -> Tensor:
    return model(batch).masked[:, : model.config.vocab_size].float()


def _mean_loss(model: BertForPretraining, batches: list[MicroBatch]) -> float:
    losses = [F.cross_entropy(_logits(model, batch), batch.slot_labels, reduction="none") for batch in batches]
    return float(torch.cat(losses).mean())


def _example(model: BertForPretraining, batch: MicroBatch, tokenizer: Tokenizer) -> str:
    guesses = _logits(model, batch).argmax(1)
    pieces = [tokenizer.id_to_token(int(token)) for token in batch.tokens[1:-1]]
    for slot, guess, label in zip(batch.slots, guesses, batch.slot_labels):
        right = "" if guess == label else f", was {tokenizer.id_to_token(int(label))}"
        pieces[int(slot) - 1] = f"[{tokenizer.id_to_token(int(guess))}{right}]"
    return " ".join(pieces)


def _reorder(model: BertForPretraining, state: CanonicalState, taken: float, meant: float) -> None:
    heads, ranks = state.config.num_attention_heads, state.facts.tensor
    for layer in model.encoder.layer_list():
        for parameter in layer.attention.query_key_value.parameters():
            parameter.copy_(reread(parameter, taken, meant, heads, ranks))
