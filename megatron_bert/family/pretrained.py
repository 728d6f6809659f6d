"""What all classes of the family have in common: initial weights, sizes, pruning, checkpointing, saving and loading."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.family.kinds import checked_switch, told
from megatron_bert.family.load import LoadingReport, format_name, load_model
from megatron_bert.family.names import MEGATRON_BERT, Names
from megatron_bert.family.outputs import ModelOutput
from megatron_bert.family.recomputing import Recomputing
from megatron_bert.family.save import RANGES_NAME, save_model
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.directories import directory_path
from megatron_bert.model.heads import MaskedLanguageHead
from megatron_bert.model.layer import TransformerLayer
from megatron_bert.model.resharding import replaced, undivided
from parallel.errors import UserError
from parallel.layers import VocabParallelEmbedding
from parallel.mesh import TensorParallel
from parallel.sharding import initialize

logger = logging.getLogger(__name__)

#: Ends of the names of what is looked up in a table; an output matrix of its own is none.
_TABLES = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "distance.weight")


class PreTrainedModel(Recomputing):
    """The base of every class; those with a head hold the encoder under the name ``base_model_prefix``.

    Attributes:
        config: sizes and options.
        tp: the tensor-parallel handle.
    """

    base_model_prefix: ClassVar[str]
    config_class: ClassVar[type[MegatronBertConfig]]
    #: Of parameters, in files.
    names: ClassVar[Names]
    #: Where the encoder's norms are.
    layer_norm_placement: ClassVar[str]
    #: Keyword arguments of the constructor that from_pretrained passes on, beside those of every class.
    own_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MegatronBertConfig, tp: TensorParallel, skip_padding: bool | None) -> None:
        super().__init__()
        if not isinstance(config, self.config_class) or config.model_type != self.config_class.model_type:
            raise UserError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, but got a {type(config).__name__}"
            )
        if config.layer_norm_placement != self.layer_norm_placement:
            raise UserError(
                f"model.layer_norm_placement is {config.layer_norm_placement!r}, but that of {type(self).__name__} is "
                f"{self.layer_norm_placement!r}: use a class that has its norms there"
            )
        if not isinstance(tp, TensorParallel):
            raise UserError(f"tp is {told(tp)}: give a TensorParallel handle, or leave it out on one device")
        if tp.sequence:
            raise UserError("these classes divide matrices, not tokens: give a handle without sequence parallelism")
        self.config, self.tp = config, tp
        self._skip_padding = None if skip_padding is None else checked_switch("skip_padding", skip_padding)

    # ---------------------------------------------------------------- parts

    @property
    def base_model(self) -> Any:
        """The encoder without a head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def skip_padding(self) -> bool | None:
        """Whether padding is skipped; see :class:`~megatron_bert.family.encoder.EncoderModel`."""
        return self.base_model._skip_padding

    @skip_padding.setter
    def skip_padding(self, value: bool | None) -> None:
        self.base_model._skip_padding = None if value is None else checked_switch("skip_padding", value)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters over all ranks, without padding of the vocabulary, and perhaps without embeddings."""
        count = 0
        for name, parameter in self.named_parameters():
            excluded = exclude_embeddings and name.endswith(_TABLES)
            if not excluded and (parameter.requires_grad or not only_trainable):
                rows = parameter.shape[0]
                words = rows == self.config.padded_vocab_size and self.has_words(name)
                count += parameter.numel() // rows * (self.config.vocab_size if words else rows)
        return count

    def has_words(self, name: str) -> bool:
        """Whether a parameter has a row for each word, so that it is padded with the vocabulary."""
        return self.names.canonical(name) in (
            "embeddings.word_embeddings.weight",
            "masked_head.bias",
            "output_embeddings.weight",
        )

    def wants(self, given: bool | None, field: str) -> bool:
        """An argument, or the configuration's answer where there is none."""
        return bool(getattr(self.config, field) if given is None else given)

    def returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """An output in the form asked for: with fields, or as a tuple."""
        return output if self.wants(return_dict, "return_dict") else output.to_tuple()

    def layer_list(self) -> list[TransformerLayer]:
        """The transformer layers, lowest first."""
        return self.base_model.encoder.layer_list()

    def get_input_embeddings(self) -> VocabParallelEmbedding:
        """The word embeddings."""
        return self.base_model.embeddings.word_embeddings

    # ---------------------------------------------------------------- initial weights

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules under their names in a pretraining checkpoint, each ending in a dot."""
        for name, child in self.named_children():
            if isinstance(child, PreTrainedModel):
                yield from child.parts()
            else:
                yield self.names.canonical(f"{name}."), child

    def _begin(self, initial: bool) -> None:
        """Draw initial weights: as the pretraining model's, they depend on the seed and on names, not on ranks."""
        if initial:
            seed = self.fresh_seed()
            for prefix, module in self.parts():
                initialize(module, seed, prefix=prefix)

    def fresh_seed(self) -> int:
        """A number from torch's generator, the same on every tensor rank."""
        seed = torch.randint(1 << 62, (1,))
        if self.tp.size > 1:
            assert self.tp.mesh is not None
            seed = seed.to(self.tp.mesh.device_type)
            dist.broadcast(seed, group=self.tp.group, group_src=0)
        return int(seed)

    # ---------------------------------------------------------------- changes of a model

    def prune_heads(self, heads_to_prune: dict[int, Iterable[int]]) -> None:
        """Remove attention heads for good: layer -> heads, numbered as they were at first.

        The parameters concerned are replaced by smaller ones, so an optimizer must be made afterwards.

        Raises:
            UserError: a layer or head that is not there, or none would remain.
        """
        before = self.config.pruned_heads
        pruned = {layer: set(heads) for layer, heads in (before or {}).items()}
        try:
            for layer, heads in heads_to_prune.items():
                pruned.setdefault(index(layer), set()).update(index(head) for head in heads)
        except (AttributeError, TypeError):
            raise UserError(
                f"heads_to_prune is {told(heads_to_prune)}: give numbers of heads by number of layer, such as "
                "{0: [1, 2]}"
            ) from None
        layers = self.layer_list()
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in pruned.items()}
        attentions = {layer: layers[layer].attention for layer in pruned}
        try:
            for layer, attention in attentions.items():
                attention.places_without(pruned[layer])
        except UserError:
            self.config.pruned_heads = before
            raise
        for layer, attention in attentions.items():
            attention.prune(pruned[layer])

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> VocabParallelEmbedding:
        """Give the vocabulary another size: rows are kept from the start, new ones are drawn as initial weights.

        The output matrix of a language-model head and its bias follow. An optimizer must be made afterwards.

        Args:
            new_num_tokens: number of words; None leaves it as it is.
            pad_to_multiple_of: round the number up to a multiple of this.

        Returns:
            The word embeddings.

        Raises:
            UserError: a number that is none, or too small for the special tokens.
        """
        words = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        for name, number in (("new_num_tokens", words), ("pad_to_multiple_of", pad_to_multiple_of)):
            if number is not None and (type(number) is not int or number < 1):
                raise UserError(f"{name} is {told(number)}: give 1 or more, or None")
        if pad_to_multiple_of is not None:
            words = -(-words // pad_to_multiple_of) * pad_to_multiple_of
        before = self.config.vocab_size
        self.config.vocab_size = words
        generator = torch.Generator().manual_seed(self.fresh_seed())
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(module, VocabParallelEmbedding | MaskedLanguageHead):
                    self._resize(module, name, parameter, before, generator)
        return self.get_input_embeddings()

    def _resize(
        self, module: nn.Module, name: str, parameter: nn.Parameter, before: int, generator: torch.Generator
    ) -> None:
        words, rows = self.config.vocab_size, self.config.padded_vocab_size
        old = undivided(parameter)
        values = old.new_zeros((rows, *old.shape[1:]))
        kept = min(before, words)
        values[:kept] = old[:kept]
        if parameter.dim() == 2:
            fresh = torch.empty((words - kept, old.shape[1]))
            values[kept:words] = fresh.normal_(0.0, self.config.initializer_range, generator=generator).to(values)
        setattr(module, name, replaced(parameter, values, self.tp))
        if isinstance(module, VocabParallelEmbedding):
            module.vocab_size, module.padded_vocab_size = words, rows
            module.first_row = self.tp.rank * (rows // self.tp.size)

    # ---------------------------------------------------------------- files

    def saved_config(self) -> MegatronBertConfig:
        """The configuration that describes the model as it is now."""
        return self.config

    def extra_tensors(self) -> dict[str, Tensor]:
        """What is saved beside the parameters, by transformers' names of a class with a head."""
        return {}

    def save_beside(self, directory: Path) -> None:
        """Write what a directory holds besides configuration and weights; the first tensor rank calls."""
        path = directory / RANGES_NAME
        if not any(True for _ in self.buffers()):
            path.unlink(missing_ok=True)  # of an older model
        elif not path.is_file():
            logger.warning(
                "%s is quantised, and %s holds only its float weights: save_ranges of megatron_bert.ibert.family "
                "writes its ranges beside them, for load_ranges to quantise the loaded model",
                type(self).__name__,
                directory,
            )

    def finish_loading(self, directory: Path, report: LoadingReport) -> None:
        """Do what is to be done once the parameters are loaded; here, say what is not done with a quantized model."""
        del report
        if (directory / RANGES_NAME).is_file():
            logger.warning(
                "%s: %s is a quantized model, loaded in floating point without its %s: "
                "megatron_bert.ibert.family.ranges.load_ranges(model, directory) restores the integers, and "
                "megatron_bert.ibert.IntegerModel runs them",
                type(self).__name__,
                directory,
                RANGES_NAME,
            )

    def save_pretrained(
        self, directory: str | Path, *, max_shard_size: int | str = "5GB", tokenizer: Any = None
    ) -> None:
        """Write ``config.json`` and safetensors with the names that transformers' classes read.

        Every tensor rank calls; the first writes.

        Args:
            directory: to write into; made if it is not there.
            max_shard_size: bytes, or a number with KB, MB or GB, above which a file is divided.
            tokenizer: saved beside the weights, if given: anything with a ``save(directory)`` or
                ``save_pretrained(directory)``.

        Raises:
            UserError: no such directory can be made, or another argument is wrong.
        """
        write: Callable[[Path], Any] | None = getattr(tokenizer, "save_pretrained", getattr(tokenizer, "save", None))
        if tokenizer is not None and write is None:
            raise UserError(
                f"tokenizer is a {type(tokenizer).__name__}, which cannot be saved: give a tokenizer or None"
            )
        path = directory_path(directory)
        save_model(self, path, max_shard_size)
        if write is not None and self.tp.rank == 0:
            write(path)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: MegatronBertConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **changes: Any,
    ) -> Self | tuple[Self, dict[str, list[str]]]:
        """Load a model that this or transformers' class of any head has written.

        Parameters that the files do not hold get initial values, and are named in a warning, as is what the files hold
        beyond.

        Args:
            directory: with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.
            config: in place of the directory's.
            torch_dtype, dtype: number format of the parameters, ``torch.float16`` or ``"float16"``; ``"auto"`` takes
                that of the files. float32 by default. Two names for the same, as transformers has had.
            ignore_mismatched_sizes: give parameters of another shape than the files' initial values, not an error.
            output_loading_info: return what was missing and unexpected too.
            **changes: fields of the configuration, and arguments of the constructor (``tp``, ``skip_padding``,
                ``device``, ..).

        Returns:
            The model in evaluation mode; with ``output_loading_info`` also the lists by kind.

        Raises:
            UserError: no such files, or they do not fit.
        """
        if torch_dtype is None:
            torch_dtype = dtype
        elif dtype is not None and format_name(torch_dtype) != format_name(dtype):
            raise UserError(f"dtype is {told(dtype)}, but torch_dtype {told(torch_dtype)}: give one of them")
        checked_switch("ignore_mismatched_sizes", ignore_mismatched_sizes)
        checked_switch("output_loading_info", output_loading_info)
        path = directory_path(directory)
        names = ("tp", "skip_padding", "device", *cls.own_arguments)
        construct = {name: changes.pop(name) for name in names if name in changes}
        if config is None:
            config = cls.config_class.from_pretrained(path, **changes)
        elif changes:
            config = cls.config_class.from_dict(config.to_dict(), **changes)
        model = cls(config, initial=False, **construct)  # type: ignore[call-arg]
        report: LoadingReport = load_model(model, path, torch_dtype, ignore_mismatched_sizes)
        model.finish_loading(path, report)
        model.eval()
        return (model, report.as_dict()) if output_loading_info else model


class MegatronBertPreTrainedModel(PreTrainedModel):
    """The base of every MegatronBERT class."""

    base_model_prefix = "bert"
    config_class = MegatronBertConfig
    names = MEGATRON_BERT
    layer_norm_placement = "pre"
