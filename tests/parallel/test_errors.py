# SPDX-License-Identifier: Apache-2.0
"""Errors speak of arguments, which the layer above calls by the names of its settings."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_bert.config import RunSettings, Settings
from megatron_bert.finetuning.settings import FinetuneSettings
from megatron_bert.quantizing.settings import QuantizeSettings
from parallel.errors import ArgumentError, UserError, called, counted, with_article

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: tuple[type[RunSettings], ...] = (Settings, FinetuneSettings, QuantizeSettings)


def raised(text: str, **names: str) -> UserError:
    with pytest.raises(UserError) as found, called(**names):
        raise ArgumentError(text)
    return found.value


def test_arguments_are_shown_by_the_names_that_the_user_knows() -> None:
    text = "$sizes [1, 2] does not fit a model's $layers: 'the $sizes' and \"$layers\" are values, in /$sizes"
    assert str(ArgumentError(text)) == text.replace("$", "", 2)
    named = raised(text, sizes="parallel.stage_layers", tensor="parallel.tensor")
    assert str(named).startswith("parallel.stage_layers [1, 2] does not fit a model's layers: 'the $sizes' and")
    assert str(pickle.loads(pickle.dumps(named))) == str(named)
    assert isinstance(named, ArgumentError)


def test_the_nearest_names_count() -> None:
    with pytest.raises(ArgumentError) as found, called(sizes="outer", layers="outer.layers"), called(sizes="inner"):
        raise ArgumentError("$sizes and $layers")
    assert str(found.value) == "inner and outer.layers"


def names_of_settings() -> set[str]:
    names = set()
    for kind in SETTINGS:
        for section, info in kind.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                names |= {f"{section}.{field.alias or name}" for name, field in annotation.model_fields.items()}
    return names


def test_names_of_settings_stay_above() -> None:
    names = names_of_settings()
    assert {"training.device", "parallel.tensor", "model.from", "quantization.observer"} <= names
    whole = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names)))})\b(?!\.\w)")
    begun = re.compile(rf"\b(?:{'|'.join(sorted({name.split('.')[0] for name in names}))})\.$")  # f"parallel.{name}"
    found = []
    for path in sorted((ROOT / "parallel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            patterns = (whole, begun) if isinstance(node, ast.JoinedStr) else (whole,)
            for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    named = [match[0] for pattern in patterns for match in pattern.finditer(part.value)]
                    found += [f"{path.relative_to(ROOT)}:{part.lineno}: {name}" for name in named]
    assert not found, found


def test_names_have_their_article():
    assert [with_article(name) for name in ("IBertModel", "MegatronBertModel", "albert")] == [
        "an IBertModel",
        "a MegatronBertModel",
        "an albert",
    ]


def test_numbers_of_things() -> None:
    assert counted(1, "thread") == "1 thread"
    assert counted(2000, "thread") == "2,000 threads"
    assert counted(0, "process", "processes") == "0 processes"
