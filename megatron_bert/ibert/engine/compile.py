# SPDX-License-Identifier: Apache-2.0
"""From a frozen quantized model to a plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert import layer_norm as integer_norm
from megatron_bert.ibert import tanh as integer_tanh
from megatron_bert.ibert.attention import argument_factor
from megatron_bert.ibert.embeddings import WORD_BITS, QuantizedEmbeddings
from megatron_bert.ibert.embeddings import row_factor as word_factor
from megatron_bert.ibert.engine.plan import (
    Attention,
    Dense,
    Embeddings,
    Gelu,
    Heads,
    Layer,
    MaskedLanguage,
    Matrix,
    Norm,
    Plan,
    Pooler,
    Read8,
    Rescale,
    Wide,
)
from megatron_bert.ibert.epilogues import activation_steps, exact_read, integer_bias
from megatron_bert.ibert.fixed_point import GUARD_BITS, Factor, dyadic, factor, reading_factor
from megatron_bert.ibert.heads import LOGIT_BITS, QuantizedDense, QuantizedMaskedLanguageHead, QuantizedPooler
from megatron_bert.ibert.layer import QuantizedTransformerLayer
from megatron_bert.ibert.modules import Quantized, QuantizedLayerNorm
from megatron_bert.ibert.products import IntegerWeight, quantize_weight
from megatron_bert.ibert.quantization import quantizers
from megatron_bert.ibert.quantizer import Quantizer
from megatron_bert.ibert.softmax import mean_factor, score_factor
from megatron_bert.ibert.stream import epsilon_steps
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.effective_weights import effective_weight
from megatron_bert.model.layer import LayerNorm
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import UserError
from parallel.sharding import local_tensor

#: A shift to the left beyond this saturates whatever is not 0.
_LARGEST_LEFT = 15


class Parts(NamedTuple):
    """The quantized modules of a model; heads are None where there are none.

    Attributes:
        config: of the model.
        task: what it answers.
        output: matrix of the masked-language head, where that is not the table of words.
    """

    config: MegatronBertConfig
    task: str
    embeddings: nn.Module
    layers: list[nn.Module]
    final_norm: nn.Module | None = None
    pooler: nn.Module | None = None
    classifier: nn.Module | None = None
    pair: nn.Module | None = None
    masked: nn.Module | None = None
    output: Tensor | None = None


@torch.no_grad()
def compile_plan(parts: Parts) -> Plan:
    """Compute every constant of a model once.

    Args:
        parts: of a model that one process holds whole, on the CPU, with ranges.

    Raises:
        UserError: a part is in floating point, has functions in floating point, or no range.
    """
    _check(parts)
    embeddings = parts.embeddings
    assert isinstance(embeddings, QuantizedEmbeddings)
    exponent = _exponent(embeddings.quantizer("output"))
    compiled = _embeddings(parts.config, embeddings)
    layers = []
    for layer in parts.layers:
        assert isinstance(layer, QuantizedTransformerLayer)
        layers.append(_layer(layer, exponent))
        exponent = _exponent(layer.quantizer("output"))
    final_norm = None
    if parts.final_norm is not None:
        assert isinstance(parts.final_norm, QuantizedLayerNorm)
        final_norm = _norm(parts.final_norm, parts.final_norm, "input", "output", exponent)
        exponent = _exponent(parts.final_norm.quantizer("output"))
    return Plan(
        config=parts.config.to_dict(),
        settings=embeddings.settings.model_dump(),
        task=parts.task,
        hidden_exponent=exponent,
        embeddings=compiled,
        layers=tuple(layers),
        final_norm=final_norm,
        heads=_heads(parts, exponent),
    )


def _check(parts: Parts) -> None:
    modules = [parts.embeddings, *parts.layers]
    modules += [
        m for m in (parts.final_norm, parts.pooler, parts.classifier, parts.pair, parts.masked) if m is not None
    ]
    for module in modules:
        if not isinstance(module, Quantized):
            raise UserError("the model is in floating point: quantize it first")
        if module.force:
            raise UserError(
                f"the model computes {', '.join(sorted(module.force))} in floating point (force_dequant), which no "
                "integer engine does: quantize it with force_dequant none"
            )
        for _, quantizer in quantizers(module):
            quantizer.scale()  # which says what to do where there is no range


# ---------------------------------------------------------------- constants


def _exponent(quantizer: Quantizer) -> int:
    """K of a scale 2^-k."""
    return round(-torch.tensor(quantizer.scale(), dtype=torch.float64).log2().item())


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _rescale(number: Factor) -> Rescale:
    return Rescale(number.shift.clamp(min=-_LARGEST_LEFT).to(torch.int8), number.multiplier.to(torch.int16))


def _matrix(weight: Tensor, bias: Tensor | None, scale: float, bits: int) -> tuple[Matrix, Tensor]:
    """A matrix, and the float64 scale of its accumulators."""
    integers = quantize_weight(local_tensor(weight), bits)
    accumulators = integers.scale.double() * scale
    rows = torch.zeros(len(accumulators)) if bias is None else local_tensor(bias)
    return _packed(integers, integer_bias(rows, accumulators)), accumulators


def _packed(integers: IntegerWeight, bias: Tensor) -> Matrix:
    return Matrix(integers.q.to(torch.int8), bias.to(torch.int32))


def _wide(accumulators: Tensor) -> Wide:
    number = dyadic(accumulators * 2.0**LOGIT_BITS)
    return Wide(number.shift.to(torch.int8), number.multiplier.to(torch.int32))


def _read8(quantizer: Quantizer, producer: int) -> Read8:
    """From a stream of scale 2^-producer."""
    number = reading_factor(_scalar(1.0 / quantizer.scale()))
    return Read8(int(number.shift) + producer, int(number.multiplier), quantizer.target().high)


def _norm(module: Quantized, norm: LayerNorm, source: str, result: str, producer: int) -> Norm:
    before, after = module.quantizer(source), module.quantizer(result)
    parameters = integer_norm.affine(norm.weight, norm.bias, _scalar(after.scale()))
    shift = int(parameters.shift)
    return Norm(
        read=producer - _exponent(before),
        read_limit=before.target().high,
        gain=parameters.gain.to(torch.int16),
        offset=(parameters.offset + (1 << (shift - 1))).to(torch.int32),
        shift=shift,
        epsilon=epsilon_steps(norm.eps, len(norm.weight), before.scale()),
        limit=after.target().high,
    )


# ---------------------------------------------------------------- modules


def _embeddings(config: MegatronBertConfig, module: QuantizedEmbeddings) -> Embeddings:
    summed = module.quantizer("output" if module.norm is None else "sum")
    target, scale = summed.target(), summed.scale()
    words = local_tensor(module.word_embeddings.weight)[: config.vocab_size]
    integers = quantize_weight(words, WORD_BITS)

    def table(weight: Tensor) -> Tensor:
        return exact_read(scale, weight.device)(weight.float()).clamp_(target.low, target.high).to(torch.int16)

    return Embeddings(
        word=integers.q.to(torch.int8),
        word_rescale=_rescale(word_factor(integers.scale, target.unit)),
        position=table(module.position_embeddings.weight),
        token_type=table(module.token_type_embeddings.weight),
        first_position=config.first_position,
        limit=target.high,
        norm=None if module.norm is None else _norm(module, module.norm, "sum", "output", _exponent(summed)),
    )


def _layer(module: QuantizedTransformerLayer, producer: int) -> Layer:
    post, bits = module.post_norm, module.settings.weight_bits
    attention, mlp, q = module.attention, module.mlp, module.quantizer
    scales = {name: q(name).scale() for name in module.ranges}
    # Rows head by head, in each the query's, the key's and the value's: to all queries, all keys, all values.
    fused, fused_bias = attention.query_key_value.weight, attention.query_key_value.bias
    order = (
        torch.arange(len(local_tensor(fused))).view(attention.heads, 3, attention.head_dim).transpose(0, 1).flatten()
    )
    rows = None if fused_bias is None else local_tensor(fused_bias)[order]
    query_key_value, sums = _matrix(local_tensor(fused)[order], rows, scales["attention_input"], bits)
    of_rows = torch.tensor([scales[name] for name in ("query", "key", "value")], dtype=torch.float64)
    to = of_rows.repeat_interleave(attention.heads * attention.head_dim)
    attention_output, of_attention = _matrix(attention.output.weight, attention.output.bias, scales["context"], bits)
    intermediate, of_intermediate = _matrix(mlp.intermediate.weight, mlp.intermediate.bias, scales["mlp_input"], bits)
    output, of_output = _matrix(mlp.output.weight, mlp.output.bias, scales["gelu"], bits)
    steps = activation_steps(None, of_intermediate, q("gelu").target())
    assert steps.result.multiplier is not None
    totals = ("attention_sum", "mlp_sum") if post else ("middle", "output")
    first, second = (_exponent(q(name)) for name in totals)
    # What the second half reads: the first sum, or its norm.
    middle = _exponent(q("middle"))
    score = score_factor(scales["query"] * scales["key"] * argument_factor(attention.head_dim))
    mean = mean_factor(scales["value"] * 1.0 / scales["context"])
    if post:
        attention_norm = _norm(module, module.attention_norm, "attention_sum", "middle", first)
        mlp_norm = _norm(module, module.mlp_norm, "mlp_sum", "output", second)
    else:
        attention_norm = _norm(module, module.attention_norm, "input", "attention_input", producer)
        mlp_norm = _norm(module, module.mlp_norm, "middle", "mlp_input", middle)
    return Layer(
        read_attention=_read8(q("attention_input"), producer) if post else None,
        attention_norm=attention_norm,
        query_key_value=query_key_value,
        query_key_value_rescale=_rescale(factor(sums / to, GUARD_BITS)),
        attention=Attention(
            heads=attention.heads,
            limit=q("query").target().high,
            score_shift=score.shift,
            score_multiplier=score.multiplier,
            mean_multiplier=mean.multiplier,
            mean_exponent=mean.exponent,
            context_limit=q("context").target().high,
        ),
        attention_output=attention_output,
        attention_output_rescale=_rescale(factor(of_attention * 2.0**first)),
        attention_read=producer - first,
        attention_limit=q(totals[0]).target().high,
        read_mlp=_read8(q("mlp_input"), middle) if post else None,
        mlp_norm=mlp_norm,
        intermediate=intermediate,
        intermediate_rescale=_rescale(factor(of_intermediate * 2.0**steps.exponent)),
        gelu=_gelu(q("gelu"), steps.exponent, steps.result.multiplier),
        output=output,
        output_rescale=_rescale(factor(of_output * 2.0**second)),
        output_read=middle - second,
        output_limit=q(totals[1]).target().high,
    )


def _gelu(quantizer: Quantizer, exponent: int, multiplier: Tensor) -> Gelu:
    target = quantizer.target()
    return Gelu(exponent, int(multiplier * 2**15), -target.low, target.high - target.low)


# ---------------------------------------------------------------- heads


def _heads(parts: Parts, producer: int) -> Heads:
    after_pooler = parts.pooler is not None and parts.task in HEADS
    return Heads(
        pooler=None if parts.pooler is None else _pooler(parts.pooler, producer),
        classifier=_dense(parts.classifier, integer_tanh.RESULT_BITS if after_pooler else producer),
        pair=_dense(parts.pair, integer_tanh.RESULT_BITS),
        masked=None if parts.masked is None else _masked(parts, parts.masked, producer),
    )


def _pooler(module: nn.Module, producer: int) -> Pooler:
    assert isinstance(module, QuantizedPooler)
    quantizer = module.quantizer("input")
    matrix, sums = _matrix(module.weight, module.bias, quantizer.scale(), module.settings.weight_bits)
    return Pooler(_read8(quantizer, producer), matrix, _rescale(factor(sums * integer_tanh.ARGUMENT_FACTOR)))


def _dense(module: nn.Module | None, producer: int) -> Dense | None:
    if module is None:
        return None
    assert isinstance(module, QuantizedDense)
    quantizer = module.quantizer("input")
    matrix, sums = _matrix(module.weight, module.bias, quantizer.scale(), module.settings.weight_bits)
    return Dense(_read8(quantizer, producer), matrix, _wide(sums))


def _masked(parts: Parts, module: nn.Module, producer: int) -> MaskedLanguage:
    assert isinstance(module, QuantizedMaskedLanguageHead)
    assert isinstance(parts.embeddings, QuantizedEmbeddings)
    reads, gelu, bits = module.quantizer("input"), module.quantizer("gelu"), module.settings.weight_bits
    dense, sums = _matrix(effective_weight(module.dense), module.dense.bias, reads.scale(), bits)
    exponent = integer_gelu.argument_exponent(gelu.scale(), of_stream=True)
    vocabulary = parts.config.vocab_size
    tied = parts.output is None
    words = local_tensor(parts.embeddings.word_embeddings.weight if parts.output is None else parts.output)[:vocabulary]
    scale = module.quantizer("features").scale()
    decoder, of_words = _matrix(words, local_tensor(module.bias)[:vocabulary], scale, bits)
    return MaskedLanguage(
        read=_read8(reads, producer),
        dense=dense,
        rescale=_rescale(factor(sums * 2.0**exponent)),
        exponent=exponent,
        gelu_read=exponent - _exponent(gelu),
        gelu_limit=gelu.target().high,
        norm=_norm(module, module.norm, "gelu", "features", _exponent(gelu)),
        decoder=None if tied and bits == WORD_BITS else decoder.weight,
        bias=decoder.bias,
        wide=_wide(of_words),
    )
