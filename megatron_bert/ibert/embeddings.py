"""Embeddings in integer arithmetic: tables of 16 bits (the residual stream's), summed as integers."""

from __future__ import annotations

from torch import Tensor

from megatron_bert.ibert.epilogues import quantised
from megatron_bert.ibert.modules import Quantized
from megatron_bert.ibert.quantizer import Kind
from megatron_bert.ibert.settings import QuantizationConfig
from megatron_bert.model.encoder import BertEmbeddings
from megatron_bert.model.layer import own_tokens
from parallel.dropout import keyed_dropout


class QuantizedEmbeddings(Quantized, BertEmbeddings):
    """Rows of the tables rounded to the stream's scale, their sum, and with post-layer-norm its norm.

    Rows are rounded when they are looked up, which gives the integers of a rounded table. I-BERT's tables have 8 bits;
    they take no part in a matrix product, so 16 cost memory only.
    """

    def quantise(self, settings: QuantizationConfig) -> None:
        """Begin as a quantised module."""
        kinds: dict[str, Kind] = {"output": "stream"}
        if self.norm is not None:
            kinds["sum"] = "stream"
        self.adopt(settings, kinds, settings.dequantised())

    def forward(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        types: Tensor,
        keys: Tensor | None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Arguments and result as of BertEmbeddings; the result is a multiple of the output's scale."""
        if self.mode == "float":
            return super().forward(tokens, positions, types, keys, embedded).float()
        parts = [self._words(tokens) if embedded is None else embedded]
        if self.absolute:
            parts.append(self.position_embeddings(own_tokens(positions, self.tp)))
        parts.append(self.token_type_embeddings(own_tokens(types, self.tp)))
        if self.mode == "observe":
            hidden = sum(parts[1:], parts[0])
            if self.norm is not None:
                hidden = self.norm(self.observe("sum", hidden))
            return self.observe("output", hidden).float()
        summed = "output" if self.norm is None else "sum"
        quantizer = self.quantizer(summed)
        rounded = [quantised(part.float(), quantizer.scale(), quantizer.target(), quantizer.watch()) for part in parts]
        hidden = self.read(sum(rounded[1:], rounded[0]), summed)
        if self.norm is not None:
            hidden = self.normalise(self.norm, hidden, "sum", "output")
        if keys is None:
            return hidden
        return self.read(keyed_dropout(hidden, self.dropout, own_tokens(keys, self.tp)), "output")
