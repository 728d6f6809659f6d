# SPDX-License-Identifier: Apache-2.0
"""What a run computes, whatever its layout: the model, the length of its samples, the batch and the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_bert.config import RunSettings, Settings
from megatron_bert.config_sections import OptimizerSettings
from megatron_bert.data.packing import LEAST_SAMPLES
from megatron_bert.model.attention import WRITTEN_OUT_KEYS
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.flops import head_in_layers, training_flops
from megatron_bert.model.sequences import Bounds, filling
from parallel.pipeline.stage import StagePart, split_layers

#: Bytes of a number.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Words that stand for a vocabulary which is not there yet: those of BERT's.
USUAL_VOCABULARY = 30522


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """The head of a fine-tuning task.

    Attributes:
        outputs: width of its logits.
        rows: tokens of a sample that it scores.
        pooled: whether a dense layer is before it: that of the pooler, or the first of RoBERTa's head.
        sequences: of a sample: the choices of a question.
    """

    outputs: int = 2
    rows: int = 1
    pooled: bool = True
    sequences: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A training run without its layout.

    Attributes:
        length: tokens of a sequence, of which a sample is one unless its head takes several; of a row of packed ones.
        slots: masked tokens of a sample or row; 0 where there is no masked-language head.
        global_batch: samples, or rows, of an optimizer step.
        steps: of the run; None where they depend on data that nobody has looked at.
        compute: format of matrix products.
        compiled: whether layers are compiled.
        graphs: whether passes are replayed as CUDA graphs.
        losses: what the loss has of terms.
        fused_attention: whether there are kernels for attention that hold no scores, dropout or not, as on GPUs.
        rows: whether several samples share a row.
        head: of a fine-tuning task; None where it pretrains.
        pairs: of sentences that the pair head reads of a sample, or of a row, whose places for samples are fixed.
        predictions: masked tokens of a sample, by which a run balances stages; as many as slots by default.
        optimizer: by which weights follow from gradients.
    """

    config: MegatronBertConfig
    length: int
    slots: int
    global_batch: int
    steps: int | None
    compute: str
    compiled: bool
    losses: int
    graphs: bool = False
    fused_attention: bool = True
    rows: bool = False
    head: TaskHead | None = None
    pairs: int = 1
    predictions: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    @property
    def sample_tokens(self) -> int:
        """Tokens of a sample."""
        return self.length if self.head is None else self.length * self.head.sequences

    def tokens(self, micro_batch: int, multiple: int = 1) -> int:
        """Tokens of a micro batch, with what it is filled up with.

        Args:
            micro_batch: samples.
            multiple: of ranks that divide the tokens.
        """
        tokens = micro_batch * self.sample_tokens
        return tokens if self.head is None else tokens + filling(tokens, multiple, few=self.compiled)

    def read_tokens(self, micro_batch: int) -> int:
        """Tokens of a micro batch whose last hidden states heads read, at most."""
        each = self.slots + self.pairs if self.head is None else self.head.rows
        return min(micro_batch * each, micro_batch * self.sample_tokens)

    def attended_tokens(self, micro_batch: int, multiple: int = 1) -> int:
        """Tokens that attention works on: more than there are where sequences of no tokens stand in a rectangle.

        Compiled code is given those to see few shapes, and no kernel takes packed sequences in float32.
        """
        if self.head is None or not (self.compiled and self.fused_attention and self.number_bytes == 4):
            return self.tokens(micro_batch, multiple)
        return Bounds(micro_batch * self.head.sequences, self.length, multiple).places * self.length

    @property
    def number_bytes(self) -> int:
        """Of a number in the format of matrix products."""
        return BYTES[self.compute]

    @property
    def writes_scores(self) -> bool:
        """Whether attention holds its scores."""
        if self.fused_attention:
            return False
        few = self.number_bytes == 2 and self.length <= WRITTEN_OUT_KEYS
        return few or self.config.attention_probs_dropout_prob > 0

    @property
    def pretraining(self) -> bool:
        """Whether it ends in the masked-language head, which shares the word embeddings."""
        return self.head is None

    @property
    def step_flops(self) -> float:
        """Operations of the model in a step, by which the MFU is: no recomputation, scores of both directions."""
        batch = self.global_batch
        return training_flops(
            self.config,
            tokens=batch * self.sample_tokens,
            squared_lengths=batch * self.sample_tokens * self.length,
            predictions=batch * self.slots,
            pairs=batch if self.config.binary_head else 0,
        )

    def stage_parts(self, stages: int, sizes: list[int] | None = None) -> list[StagePart]:
        """What each stage holds, balanced as a run does.

        Raises:
            UserError: more stages than layers, or sizes that do not fit.
        """
        head = head_in_layers(self.config, self.length, self.slots if self.predictions is None else self.predictions)
        return split_layers(self.config.num_hidden_layers, stages, last_cost=head, sizes=sizes)


def workload_of(
    settings: RunSettings, config: MegatronBertConfig, steps: int | None, length: int, head: TaskHead | None = None
) -> Workload:
    """The workload of a run.

    Args:
        settings: of the run, of any kind.
        steps: None where they are not known.
        length: tokens of a sequence.
        head: of a fine-tuning task, as far as it is known; two classes on each sequence by default.
    """
    pretraining = isinstance(settings, Settings)
    slots, pairs = 0, 1
    if isinstance(settings, Settings):
        slots = settings.max_predictions
        if settings.data.packed:
            pairs = settings.data.row_samples or LEAST_SAMPLES
            slots = settings.row_slots(pairs)
    return Workload(
        config=config,
        length=length,
        slots=slots,
        global_batch=settings.training.global_batch_size,
        steps=steps,
        compute=settings.precision.compute,
        compiled=bool(settings.training.compile),
        graphs=isinstance(settings, Settings) and settings.training.cuda_graphs,
        losses=2 if pretraining and config.binary_head else 1,
        fused_attention=settings.training.device != "cpu",
        rows=isinstance(settings, Settings) and settings.data.packed,
        head=None if pretraining else head or TaskHead(),
        pairs=pairs,
        predictions=settings.max_predictions if isinstance(settings, Settings) else None,
        optimizer=settings.optimizer,
    )
