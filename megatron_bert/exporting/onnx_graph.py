# SPDX-License-Identifier: Apache-2.0
"""A quantized model as an ONNX graph, with QuantizeLinear and DequantizeLinear at its ranges.

Weights are 8-bit with a scale per row, and so are words. The inputs of products with weights, queries, keys, values and
contexts are rounded to the model's scales; what is between (softmax, GELU, norms, sums) is in float32, as such runtimes
compute it, so results are near those of the integer engine and not the same.

Shapes: B sequences, S tokens, H hidden size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_bert.ibert.engine.compile import Parts
from megatron_bert.ibert.engine.parts import parts_of
from megatron_bert.ibert.products import quantize_weight
from megatron_bert.ibert.quantizer import Quantizer
from megatron_bert.model.activations import GELU_APPROXIMATIONS
from megatron_bert.model.effective_weights import effective_weight
from megatron_bert.model.task_heads.kind import HeadKind
from megatron_bert.model.task_heads.table import HEADS
from parallel.errors import UserError
from parallel.whole_files import write_bytes

MODEL_NAME = "model.onnx"
_OPSET = 17
#: Added to scores of padding.
_MASKED = -1e9


def write_onnx(model: Any, path: Path) -> None:
    """Write the graph as one file.

    Args:
        model: quantized, of a public class.

    Raises:
        UserError: the package ``onnx`` is missing, or the model is not one for a graph.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("export --to onnx needs the package onnx: pip install 'megatron-bert[onnx]'") from None
    graph = _Graph(onnx, parts_of(model))
    content = graph.finished().SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(content))
    write_bytes(path, content)


class _Graph:
    """Nodes and tensors, as they are added."""

    def __init__(self, onnx: Any, parts: Parts) -> None:
        self.onnx, self.parts = onnx, parts
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._count = 0

    # ---------------------------------------------------------------- building

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node of one result, whose name is returned."""
        self._count += 1
        name = output or f"{operator.lower()}_{self._count}"
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """A tensor of the graph."""
        self._count += 1
        name = f"constant_{self._count}"
        array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        self.tensors.append(self.onnx.numpy_helper.from_array(array.astype(dtype, order="C"), name))
        return name

    def rounded(self, x: str, quantizer: Quantizer) -> str:
        """Real values at a quantizer's scale."""
        target = quantizer.target()
        unsigned = target.low != -target.high
        scale = self.constant(quantizer.scale())
        zero = self.constant(-target.low, np.uint8) if unsigned else self.constant(0, np.int8)
        if target.high - target.low < 254:  # 7 bits
            low, high = (self.constant(bound * quantizer.scale()) for bound in (target.low, target.high))
            x = self.add("Clip", x, low, high)
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, scale, zero), scale, zero)

    def linear(self, x: str, weight: Tensor, bias: Tensor | None, bits: int, output: str | None = None) -> str:
        """A product with weights of 8 bits, ``[.., K]`` to ``[.., N]``."""
        integers = quantize_weight(weight.detach(), bits)
        matrix = self.constant(integers.q.t(), np.int8)
        zeros = self.constant(np.zeros(len(integers.scale)), np.int8)
        matrix = self.add("DequantizeLinear", matrix, self.constant(integers.scale), zeros, axis=1)
        if bias is None:
            return self.add("MatMul", x, matrix, output=output)
        return self.add("Add", self.add("MatMul", x, matrix), self.constant(bias), output=output)

    def norm(self, x: str, module: Any) -> str:
        """Layer norm."""
        weight, bias = self.constant(module.weight), self.constant(module.bias)
        return self.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=float(module.eps))

    def gelu(self, x: str, hidden_act: str) -> str:
        """Of either kind."""
        half, one = self.constant(0.5), self.constant(1.0)
        if GELU_APPROXIMATIONS[hidden_act] == "tanh":
            cube = self.add("Mul", self.add("Mul", self.add("Mul", x, x), x), self.constant(0.044715))
            inner = self.add("Mul", self.add("Add", x, cube), self.constant(math.sqrt(2 / math.pi)))
            share = self.add("Tanh", inner)
        else:
            share = self.add("Erf", self.add("Div", x, self.constant(math.sqrt(2.0))))
        return self.add("Mul", self.add("Mul", x, self.add("Add", share, one)), half)

    # ---------------------------------------------------------------- the model

    def finished(self) -> Any:
        """The whole model."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        stream = self.embedded()
        padding = self._padding()
        for layer in self.parts.layers:
            stream = self.layer(layer, stream, padding)
        if self.parts.final_norm is not None:
            stream = self.norm(stream, self.parts.final_norm)
        outputs = self.heads(stream)
        inputs = [
            helper.make_tensor_value_info(name, kinds.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ]
        results = [helper.make_tensor_value_info(name, kinds.FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, "encoder", inputs, results, self.tensors)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="megatron-bert")

    def embedded(self) -> str:
        """``[B, S, H]``."""
        module: Any = self.parts.embeddings
        config = self.parts.config
        integers = quantize_weight(module.word_embeddings.weight.detach()[: config.vocab_size], 8)
        rows = self.add("Gather", self.constant(integers.q, np.int8), "input_ids")
        words = self.add("Cast", rows, to=self.onnx.TensorProto.FLOAT)
        scales = self.add("Gather", self.constant(integers.scale[:, None]), "input_ids")
        words = self.add("Mul", words, scales)
        places = self.add("Gather", self.constant(module.position_embeddings.weight), self._positions())
        kinds = self.add("Gather", self.constant(module.token_type_embeddings.weight), "token_type_ids")
        summed = self.add("Add", self.add("Add", words, places), kinds)
        return summed if module.norm is None else self.norm(summed, module.norm)

    def _positions(self) -> str:
        """Rows of the table: by place, or as of RoBERTa by the number of tokens that are not padding."""
        first = self.parts.config.first_position
        if first == 0:
            length = self.add("Gather", self.add("Shape", "input_ids"), self.constant(1, np.int64))
            return self.add("Range", self.constant(0, np.int64), length, self.constant(1, np.int64))
        padding = self.constant(first - 1, np.int64)
        real = self.add("Not", self.add("Equal", "input_ids", padding))
        real = self.add("Cast", real, to=self.onnx.TensorProto.INT64)
        counted = self.add("CumSum", real, self.constant(1, np.int64))
        return self.add("Add", self.add("Mul", counted, real), padding)

    def _padding(self) -> str:
        """What is added to scores: ``[B, 1, 1, S]``."""
        mask = self.add("Cast", "attention_mask", to=self.onnx.TensorProto.FLOAT)
        left_out = self.add("Mul", self.add("Sub", self.constant(1.0), mask), self.constant(_MASKED))
        return self.add("Unsqueeze", left_out, self.constant([1, 2], np.int64))

    def layer(self, layer: Any, stream: str, padding: str) -> str:
        """A transformer layer, ``[B, S, H]`` to the same."""
        bits, quantizer = layer.settings.weight_bits, layer.quantizer
        read = stream if layer.post_norm else self.norm(stream, layer.attention_norm)
        part = self.attention(layer, self.rounded(read, quantizer("attention_input")), padding)
        stream = self.add("Add", stream, part)
        stream = self.norm(stream, layer.attention_norm) if layer.post_norm else stream
        read = stream if layer.post_norm else self.norm(stream, layer.mlp_norm)
        inner = layer.mlp.intermediate
        wide = self.linear(self.rounded(read, quantizer("mlp_input")), inner.weight, inner.bias, bits)
        activated = self.rounded(self.gelu(wide, layer.mlp.hidden_act), quantizer("gelu"))
        part = self.linear(activated, layer.mlp.output.weight, layer.mlp.output.bias, bits)
        stream = self.add("Add", stream, part)
        return self.norm(stream, layer.mlp_norm) if layer.post_norm else stream

    def attention(self, layer: Any, x: str, padding: str) -> str:
        """``[B, S, H]`` to the same, output matrix included."""
        attention, bits, quantizer = layer.attention, layer.settings.weight_bits, layer.quantizer
        heads, dim = attention.heads, attention.head_dim
        shape = self.constant([0, 0, heads, dim], np.int64)
        fused = attention.query_key_value
        weights = fused.weight.unflatten(0, (heads, 3, dim))
        biases = None if fused.bias is None else fused.bias.unflatten(0, (heads, 3, dim))
        parts = []
        for place, name in enumerate(("query", "key", "value")):
            bias = None if biases is None else biases[:, place].flatten()
            part = self.rounded(self.linear(x, weights[:, place].flatten(0, 1), bias, bits), quantizer(name))
            order = [0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]
            parts.append(self.add("Transpose", self.add("Reshape", part, shape), perm=order))
        query, key, value = parts
        scores = self.add("Div", self.add("MatMul", query, key), self.constant(math.sqrt(dim)))
        probabilities = self.add("Softmax", self.add("Add", scores, padding), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", probabilities, value), perm=[0, 2, 1, 3])
        rows = self.add("Reshape", mixed, self.constant([0, 0, heads * dim], np.int64))
        output = attention.output
        return self.linear(self.rounded(rows, quantizer("context")), output.weight, output.bias, bits)

    # ---------------------------------------------------------------- heads

    def dense(self, x: str, module: Any, output: str | None = None) -> str:
        """A dense layer of a head."""
        rounded = self.rounded(x, module.quantizer("input"))
        return self.linear(rounded, module.weight, module.bias, module.settings.weight_bits, output)

    def heads(self, stream: str) -> dict[str, list[Any]]:
        """Outputs and their shapes."""
        parts, task = self.parts, self.parts.task
        pooled = None
        if parts.pooler is not None:
            first = self.add("Gather", stream, self.constant(0, np.int64), axis=1)
            pooled = self.add("Tanh", self.dense(first, parts.pooler), output="pooler_output")
        if task == "encoder":
            self.add("Identity", stream, output="last_hidden_state")
            size = parts.config.hidden_size
            states: dict[str, list[Any]] = {"last_hidden_state": ["batch", "length", size]}
            return states | ({} if pooled is None else {"pooler_output": ["batch", size]})
        if task in HEADS:
            return self.task_head(HEADS[task], stream if pooled is None else pooled)
        if task == "pair":
            assert pooled is not None
            self.dense(pooled, parts.pair, "logits")
            return {"logits": ["batch", 2]}
        found = {self.words(stream, "logits" if task == "masked" else "prediction_logits"): self._words_shape()}
        if parts.pair is not None:
            assert pooled is not None
            self.dense(pooled, parts.pair, "seq_relationship_logits")
            found["seq_relationship_logits"] = ["batch", 2]
        return found

    def task_head(self, kind: HeadKind, x: str) -> dict[str, list[Any]]:
        """The head of a task on the stream, or on what the pooler gives."""
        module: Any = self.parts.classifier
        if kind.by_sequence and not kind.pooled:
            x = self.add("Gather", x, self.constant(0, np.int64), axis=1)
        places = ["batch"] if kind.by_sequence else ["batch", "length"]
        if len(kind.results) == 1:
            self.dense(x, module, kind.results[0])
            return {kind.results[0]: [*places, len(module.bias)]}
        all_columns = self.dense(x, module)
        for column, name in enumerate(kind.results):
            self.add("Gather", all_columns, self.constant(column, np.int64), axis=len(places), output=name)
        return {name: [*places] for name in kind.results}

    def _words_shape(self) -> list[Any]:
        return ["batch", "length", self.parts.config.vocab_size]

    def words(self, stream: str, output: str) -> str:
        """The masked-language head."""
        module: Any = self.parts.masked
        embeddings: Any = self.parts.embeddings
        activated = self.gelu(self.dense_of_words(stream, module), module.hidden_act)
        features = self.rounded(self.norm(activated, module.norm), module.quantizer("features"))
        matrix = embeddings.word_embeddings.weight if self.parts.output is None else self.parts.output
        count = self.parts.config.vocab_size
        return self.linear(features, matrix[:count], module.bias[:count], module.settings.weight_bits, output)

    def dense_of_words(self, stream: str, module: Any) -> str:
        """The head's first layer, whose quantizer is the head's."""
        rounded = self.rounded(stream, module.quantizer("input"))
        return self.linear(rounded, effective_weight(module.dense), module.dense.bias, module.settings.weight_bits)
