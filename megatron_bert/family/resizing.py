# SPDX-License-Identifier: Apache-2.0
"""Changes of a model's sizes: fewer heads, another vocabulary, at any tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.family.checks import described
from megatron_bert.family.initial_weights import InitialWeights
from megatron_bert.family.modules import EncoderLayer, LanguageHead
from megatron_bert.model.resharding import padded, replaced, undivided
from parallel.errors import UserError
from parallel.layers import VocabParallelEmbedding


class ResizableModel(InitialWeights):
    """A model whose heads are pruned and whose vocabulary is resized."""

    def layer_list(self) -> list[EncoderLayer]:
        """The transformer layers, lowest first."""
        return list(self.base_model.encoder.layer)

    def language_head(self) -> LanguageHead | None:
        """The masked-language head, of classes that have one."""
        return None

    def prune_heads(self, heads_to_prune: dict[int, Iterable[int]]) -> None:
        """Remove attention heads for good: layer -> heads, numbered as they were at first.

        The parameters concerned are replaced by smaller ones, so an optimizer must be made afterwards. Layers may be
        counted from the end, with negative numbers.

        Raises:
            UserError: a layer or head that is not there, or none would remain.
        """
        before, count = self.config.pruned_heads, self.config.num_hidden_layers
        pruned = {layer: set(heads) for layer, heads in (before or {}).items()}
        try:
            for layer, heads in heads_to_prune.items():
                number = index(layer) + (count if -count <= index(layer) < 0 else 0)
                pruned.setdefault(number, set()).update(index(head) for head in heads)
        except (AttributeError, TypeError):
            raise UserError(
                f"heads_to_prune is {described(heads_to_prune)}: give numbers of heads by number of layer, such as "
                "{0: [1, 2]}"
            ) from None
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in pruned.items()}
        try:
            for layer in pruned:
                self.layer_list()[layer].attention.places_without(pruned[layer])
        except UserError:
            self.config.pruned_heads = before
            raise
        self._prune_as_configured()

    def _prune_as_configured(self) -> None:
        layers = self.layer_list()
        for layer, heads in (self.config.pruned_heads or {}).items():
            layers[layer].attention.prune(heads)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give the vocabulary another size; arguments as of transformers' method.

        The output matrix of a language-model head and its bias follow. An optimizer must be made afterwards.

        Raises:
            UserError: the special tokens of the configuration would be cut off.
        """
        given = {"new_num_tokens": new_num_tokens, "pad_to_multiple_of": pad_to_multiple_of}
        for name, value in given.items():
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {described(value)}: give 1 or more, or None")
        if new_num_tokens is not None:
            multiple = pad_to_multiple_of or 1
            words = -(-new_num_tokens // multiple) * multiple
            before, self.config.vocab_size = self.config.vocab_size, words  # refused where special tokens are lost
            self.config.vocab_size = before
        if self.tp.size == 1:
            table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            self._renew(table, *(module for module in [self.get_output_embeddings()] if module is not None))
            return table
        return self._resize_divided(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _renew(self, *modules: nn.Module) -> None:
        """Parameters of their own, which graphs of earlier forward passes do not know by their old sizes."""
        for module in modules:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
        if (head := self.language_head()) is not None:
            head.bias = head.decoder.bias  # type: ignore[assignment]
        self.tie_weights()

    @torch.no_grad()
    def _resize_divided(self, words: int | None, multiple: int | None, mean_resizing: bool) -> nn.Module:
        """The same with tensor parallelism: tables are put together, resized on the first rank and divided again."""
        table, head = self.get_input_embeddings(), self.language_head()
        assert isinstance(table, VocabParallelEmbedding)
        held = self.config.vocab_size
        whole = nn.Embedding.from_pretrained(undivided(table.weight)[:held].clone())
        resized = self._get_resized_embeddings(whole, words, multiple, mean_resizing).weight
        words = resized.shape[0]
        self.config.vocab_size = words
        rows = self.config.encoder_config().padded_vocab_size
        self._replace(table, "weight", resized, rows)
        table.vocab_size, table.padded_vocab_size = words, rows
        table.first_row = self.tp.rank * (rows // self.tp.size)
        if head is not None:
            output = nn.Linear(self.config.hidden_size, held)
            output.weight.copy_(undivided(head.decoder.weight)[:held])
            output.bias.copy_(undivided(head.bias)[:held])
            output = self._get_resized_lm_head(output, words, mean_resizing=mean_resizing)
            self._replace(head.decoder, "weight", output.weight, rows)
            self._replace(head.decoder, "bias", output.bias, rows)
            head.bias, head.decoder.out_features = head.decoder.bias, rows  # type: ignore[assignment]
        self.tie_weights()
        return table

    def _replace(self, module: nn.Module, name: str, values: Tensor, rows: int) -> None:
        values = values.detach().contiguous()
        dist.broadcast(values, group=self.tp.group, group_src=0)
        setattr(module, name, replaced(getattr(module, name), padded(values, rows), self.tp))
