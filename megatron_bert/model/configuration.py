"""The configuration of an encoder, with the field names of Hugging Face's MegatronBertConfig."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import UserError

#: hidden_act names and whether they mean the tanh approximation of GELU.
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True, kw_only=True)
class MegatronBertConfig:
    """Sizes and constants of a Megatron BERT encoder.

    Attributes:
        vocab_size: number of token ids in use.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads a layer; must divide hidden_size.
        intermediate_size: width of the feed-forward layer.
        hidden_act: ``gelu`` (exact, erf), or ``gelu_new`` / ``gelu_pytorch_tanh`` (tanh approximation).
        hidden_dropout_prob: dropout of embeddings, attention output and feed-forward output.
        attention_probs_dropout_prob: dropout of attention probabilities.
        max_position_embeddings: longest sequence, in tokens.
        type_vocab_size: number of token types (segments).
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: added to the variance in every layer norm. Megatron's weights were trained with 1e-5.
        pad_token_id: id of the padding token.
        vocab_size_multiple: the embedding table is padded to a multiple of this many rows.
        scaled_output_init: initialise output projections with initializer_range / sqrt(2 * layers), as Megatron does.
        binary_head: whether there is a pooler and a two-way sentence-pair head.
    """

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    vocab_size_multiple: int = 128
    scaled_output_init: bool = True
    binary_head: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads "
                f"{self.num_attention_heads}: every head needs the same number of dimensions"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"model.hidden_act is {self.hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def output_init_std(self) -> float:
        """Standard deviation of the initial output projections (attention output, second feed-forward matrix)."""
        if not self.scaled_output_init:
            return self.initializer_range
        return self.initializer_range / (2 * self.num_hidden_layers) ** 0.5
