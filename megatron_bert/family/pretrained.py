# SPDX-License-Identifier: Apache-2.0
"""What all documented classes have in common: transformers' base class, initial weights, changes and files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_bert.convert.huggingface_names import MEGATRON_BERT, WRAPPERS
from megatron_bert.convert.ranges import RANGES_NAME
from megatron_bert.family.checks import check_device, check_filled, checked_switch, described
from megatron_bert.family.configuration import DocumentedConfig, MegatronBertConfig
from megatron_bert.family.files import file_beside, remove_stale_index, stored_tensors
from megatron_bert.family.resizing import ResizableModel
from megatron_bert.model.configuration import EncoderConfig
from megatron_bert.model.directories import made_directory
from megatron_bert.model.resharding import padded, undivided
from parallel.errors import ArgumentError, UserError, brief, its_class, with_article
from parallel.mesh import SINGLE, TensorParallel
from parallel.sharding import copy_whole
from parallel.whole_files import reporting

logger = transformers.logging.get_logger(__name__)


class DocumentedModel(ResizableModel):
    """The base of every class; those with a head hold the encoder under the name ``base_model_prefix``.

    Args:
        config: sizes and options.
        tp: the tensor-parallel handle; every rank gives the same arguments and gets the same results.
        skip_padding: see :class:`~megatron_bert.family.encoder.EncoderModel`.
        initial: draw initial weights, from torch's generator; otherwise they hold no values until a checkpoint gives
            them.
        device: of the parameters.
        pooled: whether the encoder has a pooler; by default what suits the class.

    Attributes:
        config: sizes and options.
        sizes: the plain configuration of the encoder.
        tp: the tensor-parallel handle.
    """

    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["EncoderLayer", "Embeddings"]
    _supports_sdpa = True
    _input_embed_layer = "word_embeddings"
    #: Buffers of older versions.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"embeddings\.position_ids$", r"embeddings\.token_type_ids$"]
    #: Where the encoder's norms are.
    layer_norm_placement: ClassVar[str]

    def __init__(
        self,
        config: DocumentedConfig,
        *,
        tp: TensorParallel = SINGLE,
        skip_padding: bool | None = None,
        initial: bool = True,
        device: torch.device | str | None = None,
        pooled: bool | None = None,
    ) -> None:
        config = self.config_class.of(config)
        if not isinstance(config, self.config_class):
            wanted = with_article(self.config_class.__name__)
            raise UserError(f"{type(self).__name__} takes {wanted}, but got {its_class(config)}")
        if not isinstance(tp, TensorParallel):
            raise UserError(f"tp is {described(tp)}: give a TensorParallel handle, or leave it out on one device")
        if tp.sequence:
            raise UserError("these classes divide matrices, not tokens: give a handle without sequence parallelism")
        check_device(device)
        sizes: EncoderConfig = config.encoder_config()
        if sizes.layer_norm_placement != self.layer_norm_placement:
            raise ArgumentError(
                f"$layer_norm_placement is {sizes.layer_norm_placement!r}, but that of {type(self).__name__} is "
                f"{self.layer_norm_placement!r}: use a class that has its norms there"
            )
        super().__init__(config)
        self.sizes = sizes
        self.tp = tp
        self._skip_padding = None if skip_padding is None else checked_switch("skip_padding", skip_padding)
        self._initial = checked_switch("initial", initial)
        with nullcontext() if device is None else torch.device(device):
            self.build(**({} if pooled is None else {"pooled": pooled}))
            if type(self).build is not DocumentedModel.build:
                self._prune_as_configured()
                self.post_init()

    def build(self, **parts: Any) -> None:
        """Make the modules, on torch's default device; a user's class makes them after this constructor."""

    # ---------------------------------------------------------------- parts

    @property
    def skip_padding(self) -> bool | None:
        """Whether padding is skipped; see :class:`~megatron_bert.family.encoder.EncoderModel`."""
        return self.base_model._skip_padding

    @skip_padding.setter
    def skip_padding(self, value: bool | None) -> None:
        self.base_model._skip_padding = None if value is None else checked_switch("skip_padding", value)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters over all ranks, without padding of the vocabulary, and perhaps without embeddings."""
        count = super().num_parameters(only_trainable, exclude_embeddings)
        for name, parameter in self.named_parameters():
            if self.tp.size > 1 and self.has_words(name) and (parameter.requires_grad or not only_trainable):
                table = name.endswith("word_embeddings.weight") and exclude_embeddings
                rows = parameter.shape[0] if table else parameter.shape[0] - self.config.vocab_size
                count -= rows * parameter.numel() // parameter.shape[0]
        return count

    def wants(self, given: bool | None, field: str) -> bool:
        """An argument, or the configuration's answer where there is none."""
        return bool(getattr(self.config, field, False) if given is None else given)

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """An output in the form asked for: with fields, or as a tuple."""
        return output if self.wants(return_dict, "return_dict") else output.to_tuple()

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that gives logits over the vocabulary; None of classes without."""
        head = self.language_head()
        return None if head is None else head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the head another such layer."""
        head = self.language_head()
        assert head is not None, "only classes with a language-model head have output embeddings"
        head.decoder, head.bias = new_embeddings, new_embeddings.bias  # type: ignore[assignment]

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the output matrix to the word embeddings, and always the two names of its bias, as configured."""
        super().tie_weights(missing_keys, recompute_mapping)
        head = self.language_head()
        if head is None or self.config.tie_word_embeddings:
            return
        missing = set() if missing_keys is None else missing_keys
        own, other = next((k, v) for k, v in self._tied_weights_keys.items() if k.endswith("bias"))
        if own in missing and other not in missing:
            head.decoder.bias = head.bias
        else:
            head.bias = head.decoder.bias  # type: ignore[assignment]
        if not {own, other} <= missing:
            missing -= {own, other}

    def canonical_modules(self) -> dict[str, nn.Module]:
        """The encoder, and the modules that a pretraining checkpoint or a task's has too, by their names there."""
        places = ((self.names.place(name), module) for name, module in self.named_modules() if name)
        found = {place.owner: module for place, module in places if place is not None and place.parts == 1}
        return found | {"encoder": self.base_model.encoder}

    def has_words(self, name: str) -> bool:
        """Whether a parameter has a row for each word, so that it is padded with the vocabulary."""
        place = self.names.place(name.rpartition(".")[0])
        return place is not None and (
            place.owner in ("embeddings.word_embeddings", "output_embeddings")
            or (place.owner == "masked_head" and name.endswith("bias"))
        )

    # ---------------------------------------------------------------- files

    def extra_tensors(self) -> dict[str, Tensor]:
        """What is saved beside the parameters, by transformers' names."""
        return {}

    def whole_state_dict(self) -> dict[str, Tensor]:
        """Parameters as a single device holds them, without ranges; every tensor rank must call."""
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.endswith(".range")}
        if self.tp.size == 1:
            return state
        words = self.config.vocab_size
        tied = self.all_tied_weights_keys
        whole = {name: undivided(tensor) for name, tensor in state.items() if name not in tied}
        return {name: tensor[:words].clone() if self.has_words(name) else tensor for name, tensor in whole.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Leave out buffers of transformers' classes that hold nothing of a model, in its state of any version."""
        for key in list(state_dict):
            if key.startswith(prefix) and self.names.is_buffer(key.removeprefix(prefix)):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``config.json`` and safetensors; arguments as of transformers' method.

        With tensor parallelism every rank calls, and the first writes.

        Raises:
            UserError: no such directory can be made, or there is no room.
        """
        check_filled(self)
        made_directory(save_directory)
        untied = self.language_head() is not None and not self.config.tie_word_embeddings
        if kwargs.get("state_dict") is None and (self.tp.size > 1 or any(True for _ in self.buffers())):
            kwargs["state_dict"] = self.whole_state_dict() | self.extra_tensors()
        if untied:  # transformers' classes read both names of the bias
            state = dict(kwargs.get("state_dict") or self.state_dict())
            names = [name for name in self._tied_weights_keys if name.endswith("bias")]
            kwargs["state_dict"] = state | {name: state[name].clone() for name in names if name in state}
        kwargs.setdefault("is_main_process", self.tp.rank == 0)
        with reporting("written", Path(save_directory), "make room, or give another directory"):
            try:
                super().save_pretrained(save_directory, **kwargs)
            except SafetensorError as error:  # what the file system refuses is in its words
                for path in Path(save_directory).glob("*.safetensors"):
                    path.unlink()  # of a model that is not whole
                raise OSError(0, str(error), str(save_directory)) from None
        if self.tp.rank == 0:
            remove_stale_index(Path(save_directory))
            self.save_beside(Path(save_directory))

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Upload what was written, and what stands beside it; with tensor parallelism the first rank does."""
        if self.tp.rank != 0:
            return None
        self.save_beside(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def save_beside(self, directory: Path) -> None:
        """Write what a directory holds besides configuration and weights; the first tensor rank calls."""
        path = directory / RANGES_NAME
        if not any(True for _ in self.buffers()):
            path.unlink(missing_ok=True)  # of an older model
        elif not path.is_file():
            logger.warning(
                "%s is quantized, and %s holds only its float weights: save_ranges of megatron_bert.ibert.family "
                "writes its ranges beside them, for load_ranges to quantize the loaded model",
                type(self).__name__,
                directory,
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a model that this class, transformers' or one with another head has written.

        Arguments are those of transformers' method, and of the constructor: ``tp``, ``skip_padding``, ``device``. With
        tensor parallelism every rank reads the whole model and keeps its part.

        Returns:
            The model in evaluation mode; with ``output_loading_info`` also what did not fit.

        Raises:
            UserError: a value of the configuration that cannot be, or a file that is damaged or not of tensors alone.
            OSError: there is no such model.
        """
        tp = kwargs.pop("tp", SINGLE)
        device = kwargs.pop("device", None)
        check_device(device)
        if "config" in kwargs:
            kwargs["config"] = cls.config_class.of(kwargs["config"])
        if device is not None:
            kwargs["device_map"] = {"": device} if tp.size == 1 else None
        if kwargs.get("key_mapping") is None:
            aliases = {rf"^{alias}\.": f"{cls.base_model_prefix}." for alias in cls.names.aliases}
            kwargs["key_mapping"] = {WRAPPERS: "", **aliases}
        shown = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except UserError:
            raise
        except Exception as error:
            # An OSError says what is wrong, but for that of a system call on a file that it does not name.
            if not isinstance(error, OSError) or (error.errno and not error.filename):
                stored_tensors(pretrained_model_name_or_path, kwargs)  # says which file is damaged, if one is
            raise
        cls._check_found(pretrained_model_name_or_path, info)
        if tp.size > 1:
            model = model.divided(tp, device)
        model.finish_loading(pretrained_model_name_or_path, kwargs)
        model.eval()
        return (model, info) if shown else model

    @classmethod
    def _check_found(cls, source: Any, info: Mapping[str, Any]) -> None:
        """Refuse a file whose tensors have names that are not understood, while the encoder lacks some."""
        base, unexpected = f"{cls.base_model_prefix}.", sorted(info["unexpected_keys"])
        missing = sorted(name.removeprefix(base) for name in info["missing_keys"])
        missing = [name for name in missing if name.startswith(("embeddings.", "encoder."))]
        if missing and unexpected:
            raise UserError(
                f"{source} has no {missing[0]} ({len(missing)} tensors of the encoder are not there), but holds "
                f"{brief(unexpected[0])}: give its tensors the names of transformers (key_mapping=)"
            )

    @torch.no_grad()
    def divided(self, tp: TensorParallel, device: torch.device | str | None = None) -> Any:
        """The same model with its matrices divided over tensor ranks, from one that every rank holds whole."""
        model = type(self)(self.config, tp=tp, skip_padding=self.skip_padding, initial=False, device=device)
        whole = dict(self.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters():
            values = whole[name].to(parameter.device)
            parameter.data = parameter.data.to(values.dtype)
            copy_whole(parameter, padded(values, parameter.shape[0]))
        return model

    def finish_loading(self, source: Any, arguments: dict[str, Any]) -> None:
        """Do what is to be done once the parameters are loaded; here, say what is not done with a quantized model."""
        if file_beside(source, RANGES_NAME, arguments) is not None:
            logger.warning(
                "%s: %s is a quantized model, loaded in floating point without its %s: "
                "megatron_bert.ibert.family.ranges.load_ranges(model, directory) restores the integers, and "
                "megatron_bert.ibert.IntegerModel runs them",
                type(self).__name__,
                source,
                RANGES_NAME,
            )


class MegatronBertPreTrainedModel(DocumentedModel):
    """The base of every MegatronBERT class."""

    config: MegatronBertConfig
    config_class = MegatronBertConfig
    base_model_prefix = "bert"
    names = MEGATRON_BERT
    layer_norm_placement = "pre"
