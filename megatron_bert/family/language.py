"""Classes with a language-model head over the vocabulary: pretraining and masked words.

Shapes: B sequences, S tokens of each, T tokens without skipped padding, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_bert.family.arguments import Arguments, check_labels, shared_arguments
from megatron_bert.family.bert import MegatronBertHeadModel
from megatron_bert.family.encoder import Encoded
from megatron_bert.family.heads import HeadModel
from megatron_bert.family.kinds import checked_switch
from megatron_bert.family.losses import blanked, mean_cross_entropy
from megatron_bert.family.outputs import MaskedLMOutput, MegatronBertForPreTrainingOutput
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.heads import Dense, MaskedLanguageHead
from parallel.collectives import gather_from_ranks
from parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from parallel.errors import UserError
from parallel.layers import VocabParallelEmbedding
from parallel.mesh import SINGLE, TensorParallel

#: How many tokens' logits are computed at once where they are written part by part.
_CPU_ROWS, _ACCELERATOR_ROWS = 128, 1 << 13


class LanguageModel(HeadModel):
    """The encoder and a head over the vocabulary, whose output matrix is the word embeddings or one of its own.

    Args:
        config: sizes and options.
        pooled: whether the encoder has a pooler.
        tp, skip_padding, device: as in EncoderModel.
    """

    def __init__(
        self,
        config: MegatronBertConfig,
        pooled: bool,
        tp: TensorParallel,
        skip_padding: bool | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(config, pooled, tp, skip_padding, device)
        self.masked_head = MaskedLanguageHead(config, tp=tp, device=device)
        self.output_embeddings: VocabParallelEmbedding | None = None
        if not config.tie_word_embeddings:
            self.output_embeddings = VocabParallelEmbedding(
                config.vocab_size,
                config.padded_vocab_size,
                config.hidden_size,
                init_std=config.initializer_range,
                tp=tp,
                device=device,
            )

    def get_output_embeddings(self) -> VocabParallelEmbedding:
        """What holds the output matrix: the word embeddings where they are tied."""
        return self.get_input_embeddings() if self.output_embeddings is None else self.output_embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[N, H]`` to logits ``[N, V]`` on every rank."""
        local = self.masked_head(hidden, self.get_output_embeddings().weight)
        return gather_from_ranks(local, self.tp)[:, : self.config.vocab_size]

    def token_logits(self, encoded: Encoded) -> Tensor:
        """Logits ``[B, S, V]`` of every token; 0 where padding was skipped.

        They are far larger than all that they are computed from. Where nothing is kept for gradients they are written
        part by part into their places, so that no second copy of them is made.
        """
        if encoded.kept is None or torch.is_grad_enabled():
            return encoded.rectangle(self.logits(encoded.hidden))
        rows = _CPU_ROWS if encoded.hidden.device.type == "cpu" else _ACCELERATOR_ROWS
        places = encoded.batch * encoded.length
        whole: Tensor | None = None
        for hidden, kept in zip(encoded.hidden.split(rows), encoded.kept.split(rows), strict=True):
            part = self.logits(hidden)
            if whole is None:
                whole = part.new_empty((places, part.shape[1]))
            whole.index_copy_(0, kept, part)
        assert whole is not None, "padding is skipped where every sequence has a token"
        skipped = torch.ones(places, dtype=torch.bool, device=whole.device).index_fill_(0, encoded.kept, 0)
        return whole.index_fill_(0, skipped.nonzero().squeeze(1), 0.0).unflatten(0, (encoded.batch, encoded.length))

    def language_loss(self, hidden: Tensor, labels: Tensor, items: float | None = None) -> Tensor:
        """Mean cross entropy over the labelled tokens; 0 if there are none, whatever the hidden states hold.

        The head runs again on these few rows, so that the backward pass costs what they cost and not what all cost.

        Args:
            hidden: ``[N, H]``.
            labels: int64 ``[N]``; -100 is ignored.
            items: what the sum of the losses is divided by; the number of labelled tokens by default.

        Raises:
            UserError: ``items`` is 0, but there are labelled tokens.
        """
        rows = (labels != IGNORED).nonzero().squeeze(1)
        count = rows.numel()
        if items == 0 and count:
            raise UserError(
                f"num_items_in_batch is 0, but {count} words have labels: count them and those of all batches"
            )
        if count == 0:
            # A row whose label is ignored: all parameters get a gradient of 0, which data parallelism waits for.
            selected, labels = blanked(hidden[:1]), labels[:1]
        else:
            selected, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        local = self.masked_head(selected, self.get_output_embeddings().weight)
        losses = vocab_parallel_cross_entropy(local, labels.long(), self.config.vocab_size, self.tp)
        return losses.sum() / (items or max(1, count))

    def encoded(self, given: Arguments, labels: Tensor | None) -> Encoded:
        """Run the encoder, without a cache, and with every token that has a label."""
        shown, needed = not self.learns_from(labels), self.labelled(given, labels)
        return self.base_model.encode(replace(given, use_cache=False), shown=shown, needed=needed)

    def masked_loss(self, encoded: Encoded, labels: Tensor | None) -> Tensor | None:
        """The loss of masked words, where there are ``labels`` ``[B, S]``."""
        return None if labels is None else self.language_loss(encoded.hidden, encoded.of_tokens(labels))

    def labelled(self, given: Arguments, labels: Tensor | None) -> Tensor | None:
        """Check word labels, and say which tokens have one: bool ``[B, S]``."""
        if labels is None or given.shape is None:
            return None
        check_labels("labels", labels, given.shape, self.config.vocab_size, IGNORED)
        return labels != IGNORED


class MaskedLanguageModel(LanguageModel):
    """A language model that predicts the words at every token.

    Args:
        config: sizes and options.
        tp, skip_padding, initial, device: as in EncoderModel.
    """

    def __init__(
        self,
        config: MegatronBertConfig,
        *,
        tp: TensorParallel = SINGLE,
        skip_padding: bool | None = None,
        initial: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, False, tp, skip_padding, device)
        self._begin(initial)

    def predicted(
        self, given: Arguments, labels: Tensor | None, return_dict: bool | None
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits over the vocabulary, and the loss where there are ``labels`` ``[B, S]``."""
        encoded = self.encoded(given, labels)
        output = MaskedLMOutput(
            loss=self.masked_loss(encoded, labels),
            logits=self.token_logits(encoded),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.returned(output, return_dict)


class MegatronBertForMaskedLM(MegatronBertHeadModel, MaskedLanguageModel):
    """Logits over the vocabulary for every token; arguments as of MegatronBertModel."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predict words; ``labels`` int64 ``[B, S]`` holds the true ids, -100 where nothing is to be predicted."""
        return self.predicted(shared_arguments(locals()), labels, return_dict)


class MegatronBertForPreTraining(MegatronBertHeadModel, LanguageModel):
    """The two heads of pretraining: masked words and sentence pairs.

    Args:
        config: sizes and options.
        add_binary_head: whether there is a pooler and a sentence-pair head.
        tp, skip_padding, initial, device: as in MegatronBertModel.
    """

    own_arguments = ("add_binary_head",)

    def __init__(
        self,
        config: MegatronBertConfig,
        add_binary_head: bool = True,
        *,
        tp: TensorParallel = SINGLE,
        skip_padding: bool | None = None,
        initial: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, checked_switch("add_binary_head", add_binary_head), tp, skip_padding, device)
        self.pair_classifier: Dense | None = None
        if add_binary_head:
            self.pair_classifier = Dense(config.hidden_size, 2, init_std=config.initializer_range, device=device)
        self._begin(initial)

    def pair_logits(self, encoded: Encoded) -> Tensor:
        """The sentence-pair head: logits ``[B, 2]``."""
        assert self.pair_classifier is not None, "a model with sentence pairs has a head for them"
        return self.pair_classifier(self.base_model.pooled(encoded))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MegatronBertForPreTrainingOutput | tuple[Tensor, ...]:
        """Predict words and whether the second sentence follows the first.

        ``labels`` int64 ``[B, S]`` as for masked words; ``next_sentence_label`` int64 ``[B]``, 0 if it follows, 1 if it
        is another. The loss is the sum of those whose labels are given.
        """
        encoded = self.encoded(shared_arguments(locals()), labels)
        pair = None if self.pair_classifier is None else self.pair_logits(encoded)
        losses = [self.masked_loss(encoded, labels)]
        if next_sentence_label is not None:
            if pair is None:
                raise UserError(
                    "next_sentence_label is given, but there is no sentence-pair head: add_binary_head=True"
                )
            blank = lambda: self.pair_logits(encoded.blank())  # noqa: E731
            losses.append(mean_cross_entropy("next_sentence_label", pair, next_sentence_label, blank))
        present = [loss for loss in losses if loss is not None]
        output = MegatronBertForPreTrainingOutput(
            loss=sum(present[1:], present[0]) if present else None,
            prediction_logits=self.token_logits(encoded),
            seq_relationship_logits=pair,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.returned(output, return_dict)
