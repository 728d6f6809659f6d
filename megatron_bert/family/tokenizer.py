"""Text to the tensors that the classes take, and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_bert.data.tokenizer_settings import CONFIG_NAME, read_settings
from megatron_bert.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bert.model.configuration import CONFIG_NAME as MODEL_CONFIG_NAME
from parallel.errors import UserError

#: Model types whose inputs are laid out as RoBERTa's.
_LIKE_ROBERTA = ("ibert", "roberta", "xlm-roberta")


class AutoTokenizer:
    """A vocabulary, callable on texts: ``model(**tokenizer("Hello", return_tensors="pt"))``.

    Args:
        vocabulary: turns text into ids.
        max_length: tokens of the longest input of the model; None where it is not known.
        roberta: lay inputs out as RoBERTa does: two separators between a text and its pair, and no token types.
    """

    def __init__(self, vocabulary: Tokenizer, max_length: int | None = None, *, roberta: bool = False) -> None:
        self.vocabulary, self.model_max_length, self.roberta = vocabulary, max_length, roberta
        self.mask_token_id, self.pad_token_id = vocabulary.mask_id, vocabulary.pad_id
        self.mask_token = vocabulary.id_to_token(vocabulary.mask_id)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Load from a directory with tokenizer.json, vocab.txt, vocab.json and merges.txt, or a .model file.

        Inputs are laid out as RoBERTa's where the model beside it is an I-BERT or RoBERTa. What becomes of the text of
        a vocab.txt (``do_lower_case``, ``strip_accents``, ``tokenize_chinese_chars``) is what a tokenizer_config.json
        says; where that does not say ``do_lower_case``, text is lower-cased unless the vocabulary has upper case.

        Raises:
            UserError: it holds none of them, one whose ids are not the model's, or settings that are damaged.
        """
        kind = read_settings(Path(directory) / MODEL_CONFIG_NAME).get("model_type")
        length = read_settings(Path(directory) / CONFIG_NAME).get("model_max_length")
        return cls(
            load_tokenizer(directory, model_type=kind),
            length if type(length) is int and length < 1 << 20 else None,
            roberta=kind in _LIKE_ROBERTA,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the vocabulary's files, and what transformers' tokenizers need beside them."""
        folder = Path(directory)
        self.vocabulary.save(folder)
        settings: dict[str, Any] = {
            **self.vocabulary.transformers_settings(),
            "model_input_names": ["input_ids", *([] if self.roberta else ["token_type_ids"]), "attention_mask"],
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return self.vocabulary.vocab_size

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | list[str] | None = None,
        *,
        max_length: int | None = None,
        truncation: bool | str = False,
        padding: bool | str = True,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """Inputs of a batch: ``[CLS] text [SEP]`` or ``[CLS] text [SEP] pair [SEP]``, padded on the right.

        RoBERTa's are ``<s> text </s>`` and ``<s> text </s></s> pair </s>``. Mask tokens in a text (``[MASK]``) stand
        for themselves; other special tokens are ordinary characters.

        Args:
            text: one or several.
            text_pair: second texts, as many.
            max_length: most tokens; what the model takes by default.
            truncation: shorten the longer text of what is too long, instead of an error; also ``"longest_first"``.
            padding: pad to the longest, also ``"longest"``; without it all must be of one length.
            return_tensors: ``pt``; there are no others.

        Returns:
            ``input_ids``, ``token_type_ids`` (not RoBERTa's) and ``attention_mask``, int64 ``[B, S]``.

        Raises:
            UserError: no texts, texts that do not match or are too long, or another way to pad or shorten them.
        """
        if return_tensors != "pt":
            raise UserError(f"return_tensors is {return_tensors!r}: only pt, torch's tensors, are made")
        texts = [text] if isinstance(text, str) else list(text)
        pairs = [text_pair] if isinstance(text_pair, str) else None if text_pair is None else list(text_pair)
        wrong = next((part for part in (*texts, *(pairs or ())) if not isinstance(part, str)), None)
        if wrong is not None:
            raise UserError(f"a text is a {type(wrong).__name__}: give texts, one or a list of them")
        if padding not in (True, False, "longest") or truncation not in (True, False, "longest_first"):
            raise UserError(
                f"padding is {padding!r} and truncation {truncation!r}: give True or False; texts are padded to the "
                "longest, and the longest is shortened first"
            )
        if not texts or (pairs is not None and len(pairs) != len(texts)):
            raise UserError(f"{len(texts)} texts and {len(pairs or [])} pairs: give at least one, and as many of both")
        limit = max_length or self.model_max_length
        rows = [
            self._row(first, None if pairs is None else pairs[index], limit, truncation)
            for index, first in enumerate(texts)
        ]
        longest = max(len(ids) for ids, _ in rows)
        if not padding and any(len(ids) != longest for ids, _ in rows):
            raise UserError("the texts have different numbers of tokens: padding=True makes one batch of them")
        batch = {"input_ids": self.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
        tensors = {name: torch.full((len(rows), longest), fill) for name, fill in batch.items()}
        for number, (ids, types) in enumerate(rows):
            tensors["input_ids"][number, : len(ids)] = torch.tensor(ids)
            tensors["token_type_ids"][number, : len(ids)] = torch.tensor(types)
            tensors["attention_mask"][number, : len(ids)] = 1
        if self.roberta:
            del tensors["token_type_ids"]
        return tensors

    def _row(
        self, text: str, pair: str | None, limit: int | None, truncation: bool | str
    ) -> tuple[list[int], list[int]]:
        """Ids and types of one input."""
        segments = [self._encode(part) for part in (text, pair) if part is not None]
        between = self.vocabulary.pair_separators(roberta=self.roberta)
        special = 2 + between * (len(segments) - 1)
        while limit is not None and special + sum(map(len, segments)) > limit:
            if not truncation or not any(segments):
                count = special + sum(map(len, segments))
                raise UserError(f"a text has {count} tokens, but the model takes {limit}: truncation=True shortens it")
            max(segments, key=len).pop()
        ids, types = [self.vocabulary.cls_id], [0]
        for number, segment in enumerate(segments):
            last = number == len(segments) - 1
            separators = [self.vocabulary.sep_id] * (1 if last else between)
            ids += [*segment, *separators]
            types += [number] * (len(segment) + len(separators))
        return ids, types

    def _encode(self, text: str) -> list[int]:
        *before, last = text.split(self.mask_token)
        ids: list[int] = []
        for piece in before:
            # The space before a mask is the mask's, as before a word; alone it would be a token of some vocabularies.
            ids += [*self.vocabulary.encode(piece.rstrip()), self.mask_token_id]
        return [*ids, *self.vocabulary.encode(last)]

    def decode(self, ids: Tensor | list[int]) -> str:
        """Readable text of token ids, without special tokens."""
        return self.vocabulary.decode([int(token) for token in ids])
