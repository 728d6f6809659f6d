"""Writing text word by word.

Shapes: B texts, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.family.evaluation import in_evaluation
from megatron_bert.family.kinds import check_tensor, check_whole, computing_device, told
from megatron_bert.model.configuration_checks import is_number
from parallel.errors import UserError

if TYPE_CHECKING:
    from megatron_bert.family.causal import MegatronBertForCausalLM


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next word is chosen.

    Attributes:
        sample: draw it; otherwise the most likely one is taken.
        temperature, top_k, top_p, generator: see MegatronBertForCausalLM.generate.
    """

    sample: bool
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not self.temperature > 0:
            raise UserError(f"temperature is {told(self.temperature)}: give a number above 0, or do_sample=False")
        if type(self.top_k) is not int or self.top_k < 0:
            raise UserError(f"top_k is {told(self.top_k)}: give a number of words, or 0 or None for all")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {told(self.top_p)}: give a share above 0, and at most 1 or None for all")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise UserError(f"generator is {told(self.generator)}: give a torch.Generator, or None for torch's own")

    def choose(self, logits: Tensor) -> Tensor:
        """A word for each row: ``[B, V]`` to int64 ``[B]``."""
        if not self.sample:
            return logits.argmax(dim=-1)
        probabilities = self.allowed(logits.float() / self.temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits, -inf for words that must not be drawn; the most likely word always may."""
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1.0:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            # A word stays if those before it do not reach the share yet.
            beyond = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
            logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        return logits


@torch.no_grad()
def generate(
    model: MegatronBertForCausalLM,
    tokens: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    *,
    most: int,
    ends: list[int],
    padding: int,
    cached: bool,
    encoder: dict[str, Tensor | None],
) -> Tensor:
    """Continue texts until each has ended or ``most`` words are written.

    Args:
        model: a decoder.
        tokens: int64 ``[B, S]``.
        mask: ``[B, S]``, 0 for padding, which stands on the left; or None.
        sampling: how words are chosen.
        most: words to write.
        ends: ids after which a text is complete.
        padding: id that follows the end.
        cached: keep keys and values.
        encoder: arguments of the forward pass for cross-attention.

    Returns:
        int64 ``[B, S + n]``.
    """
    _check(model, tokens, mask, most)
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    endings = torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)
    past, start = None, 0
    with in_evaluation(model):
        for _ in range(most):
            # Positions count real tokens, so that a text does not depend on the padding before it.
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            out = model(
                tokens[:, start:],
                attention_mask=mask,
                position_ids=positions[:, start:],
                past_key_values=past,
                use_cache=cached,
                return_dict=True,
                logits_to_keep=1,
                **encoder,
            )
            chosen = _same_on_ranks(model, sampling.choose(out.logits[:, -1])).masked_fill(ended, padding)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            mask = torch.cat((mask, (~ended).long()[:, None]), dim=1)
            ended |= torch.isin(chosen, endings)
            if bool(ended.all()):
                break
            if cached:
                past, start = out.past_key_values, tokens.shape[1] - 1
    return tokens


def _check(model: MegatronBertForCausalLM, tokens: Tensor, mask: Tensor | None, most: int) -> None:
    if not model.config.is_decoder:
        raise UserError("only decoders write text: set is_decoder=True in the configuration")
    device = computing_device(model)
    check_tensor("input_ids", tokens, device)
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise UserError(f"input_ids has shape {list(tokens.shape)}, expected [batch, tokens] with at least one of each")
    check_whole("input_ids", tokens)
    longest = model.config.max_position_embeddings
    if type(most) is not int or most < 1 or tokens.shape[1] + most > longest:
        raise UserError(
            f"max_new_tokens is {told(most)} after {tokens.shape[1]} tokens, but the model has {longest} positions: "
            f"give 1 to {longest - tokens.shape[1]}"
        )
    if mask is not None:
        check_tensor("attention_mask", mask, device)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError("attention_mask holds other values than 0 and 1: give 1 for real tokens and 0 for padding")
        if mask.shape != tokens.shape or not bool(mask[:, -1].all()):
            raise UserError(
                f"attention_mask of shape {list(mask.shape)} does not end in real tokens for input_ids of shape "
                f"{list(tokens.shape)}: put the padding of shorter texts on the left"
            )


def _same_on_ranks(model: MegatronBertForCausalLM, chosen: Tensor) -> Tensor:
    """The first tensor rank's choice on all, whose random numbers may differ."""
    if model.tp.size > 1:
        chosen = chosen.contiguous()
        dist.broadcast(chosen, group=model.tp.group, group_src=0)
    return chosen
