# SPDX-License-Identifier: Apache-2.0
"""Parameter names of I-BERT here and in transformers' classes.

| here (with a head)      | transformers' IBert                                            |
|-------------------------|----------------------------------------------------------------|
| ibert.embeddings.norm   | ibert.embeddings.LayerNorm                                     |
| .. attention_norm       | ibert.encoder.layer.{i}.attention.output.LayerNorm             |
| .. mlp_norm             | ibert.encoder.layer.{i}.output.LayerNorm                       |
| masked_head             | lm_head                                                        |
| output_embeddings       | lm_head.decoder                                                |
| classifier, qa_outputs  | the same; of sequences classifier.dense, classifier.out_proj   |

The others are those of MegatronBert, with ``ibert.`` in front in place of ``bert.``. RoBERTa's are the same as IBert's,
with ``roberta.`` in front.
"""

from __future__ import annotations

from megatron_bert.family.names import Names

IBERT = Names(
    prefix="ibert",
    outside_layers={
        "embeddings.norm": "ibert.embeddings.LayerNorm",
        "masked_head.dense": "lm_head.dense",
        "masked_head.norm": "lm_head.layer_norm",
        "masked_head": "lm_head",
        "output_embeddings": "lm_head.decoder",
    },
    like_roberta=True,
    in_layers={
        "attention_norm": ("attention.output.LayerNorm",),
        "mlp_norm": ("output.LayerNorm",),
    },
    aliases=("roberta",),
    quantization=frozenset(
        {
            "x_min",
            "x_max",
            "act_scaling_factor",
            "weight_integer",
            "weight_scaling_factor",
            "fc_scaling_factor",
            "bias_integer",
            "shift",
        }
    ),
)
