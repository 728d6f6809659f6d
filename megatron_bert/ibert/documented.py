# SPDX-License-Identifier: Apache-2.0
"""What the modules of the documented classes become when a model is quantized.

Their parameters keep the names of transformers' classes; the arithmetic is that of the modules of the encoder.
"""

from __future__ import annotations

from torch import nn

from megatron_bert.family.modules import Embeddings, EncoderLayer, Predictions, RobertaLanguageHead
from megatron_bert.ibert.embeddings import QuantizedEmbeddings
from megatron_bert.ibert.heads import QuantizedMaskedLanguageHead
from megatron_bert.ibert.layer import QuantizedTransformerLayer
from megatron_bert.ibert.modules import Quantized


class QuantizedEncoderLayer(QuantizedTransformerLayer, EncoderLayer):
    """A quantized layer."""


class QuantizedDocumentedEmbeddings(QuantizedEmbeddings, Embeddings):
    """Quantized embeddings."""


class QuantizedPredictions(QuantizedMaskedLanguageHead, Predictions):
    """The quantized masked-language head of MegatronBERT."""


class QuantizedRobertaLanguageHead(QuantizedMaskedLanguageHead, RobertaLanguageHead):
    """The quantized masked-language head of I-BERT."""


QUANTIZED: dict[type[nn.Module], type[Quantized]] = {
    EncoderLayer: QuantizedEncoderLayer,
    Embeddings: QuantizedDocumentedEmbeddings,
    Predictions: QuantizedPredictions,
    RobertaLanguageHead: QuantizedRobertaLanguageHead,
}
