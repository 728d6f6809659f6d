# SPDX-License-Identifier: Apache-2.0
"""Every example of transformers' documentation of these classes, with a small model in the directory it names.

The text is that of the installed transformers, in which only ``from transformers import`` becomes ``from megatron_bert
import``; three examples of version 4.37 that are no longer in it stand below. Each runs with both packages on the same
files, and every tensor it makes must be the same.
"""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import megatron_bert
from megatron_bert import AutoTokenizer
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.support import CLOSE
from tests.megatron_bert.ibert.family import support as ibert
from tests.megatron_bert.ibert.family.roberta_tokenizer import write_roberta_tokenizer

#: Class -> statements in its examples. One that transformers adds, or that is not found any more, fails.
STATEMENTS = {
    "MegatronBertConfig": 4,
    "MegatronBertModel": 7,
    "MegatronBertForPreTraining": 8,
    "MegatronBertForMaskedLM": 13,
    "MegatronBertForCausalLM": 7,
    "MegatronBertForNextSentencePrediction": 10,
    "MegatronBertForSequenceClassification": 24,
    "MegatronBertForMultipleChoice": 12,
    "MegatronBertForTokenClassification": 12,
    "MegatronBertForQuestionAnswering": 16,
    "IBertConfig": 4,
    "IBertModel": 7,
    "IBertForMaskedLM": 13,
    "IBertForSequenceClassification": 24,
    "IBertForMultipleChoice": 12,
    "IBertForTokenClassification": 12,
    "IBertForQuestionAnswering": 16,
}
#: The names that the examples load, on the hub and here as directories.
CHECKPOINTS = {
    "MegatronBert": {"nvidia/megatron-bert-cased-345m", "nvidia/megatron-bert-uncased-345m"},
    "IBert": {"kssteven/ibert-roberta-base"},
}
LOADED = re.compile(r"from_pretrained\(\s*(?:\.\.\.\s*)?\"(.+?)\"")

ENCODER = """
>>> from transformers import AutoTokenizer, {name}
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("{checkpoint}")
>>> model = {name}.from_pretrained("{checkpoint}")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
>>> outputs = model(**inputs)

>>> last_hidden_states = outputs.last_hidden_state
"""
CONFIGURATION = """
>>> from transformers import IBertConfig, IBertModel

>>> # Initializing a I-BERT kssteven/ibert-roberta-base style configuration
>>> configuration = IBertConfig()

>>> # Initializing a model from the kssteven/ibert-roberta-base style configuration
>>> model = IBertModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
"""


def _family(name: str) -> str:
    return "IBert" if name.startswith("IBert") else "MegatronBert"


def _examples(name: str) -> list[str]:
    """The statements of the examples of a class."""
    theirs = getattr(transformers, name)
    text = (theirs.__doc__ if name.endswith("Config") else theirs.forward.__doc__) or ""
    if name == "IBertConfig":
        text += CONFIGURATION
    elif name in ("MegatronBertModel", "IBertModel"):
        text += ENCODER.format(name=name, checkpoint=min(CHECKPOINTS[_family(name)]))
    return [example.source for example in doctest.DocTestParser().get_examples(text)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A directory with a tokenizer of each family, which knows the words of the examples."""
    text = "\n".join("".join(_examples(name)) for name in STATEMENTS)
    assert set(LOADED.findall(text)) == set().union(*CHECKPOINTS.values())
    folders = {family: tmp_path_factory.mktemp(family) for family in CHECKPOINTS}
    words = sorted(set("".join(c if c.isalnum() else f" {c} " for c in text).split()))
    # The answer of the example stands where it stands in the published vocabulary's pieces.
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words) - {"Henson", "puppet"})]
    pieces += ["Hen", "##son", "pup", "##pet"]
    (folders["MegatronBert"] / "vocab.txt").write_text("\n".join(pieces) + "\n")
    save_tokenizer(load_tokenizer(folders["MegatronBert"]), folders["MegatronBert"], 128)
    write_roberta_tokenizer(folders["IBert"], [text, *[" Paris" * 9] * 9], max_length=128, vocab_size=600)
    return folders


def _write_checkpoints(name: str, tokenizer: Path) -> None:
    """A small model of a class with its tokenizer, in the directories that the examples name."""
    family = _family(name)
    make, head = {"IBert": ibert, "MegatronBert": megatron}[family], name.removeprefix(family)
    sizes = {"vocab_size": len(AutoTokenizer.from_pretrained(tokenizer)), "max_position_embeddings": 130}
    if "Classification" in head:
        sizes["num_labels"] = 2
    model = make.build(head, make.config_of(head, **sizes))
    if head == "ForNextSentencePrediction":  # it has learned that the example's second sentence is a random one
        with torch.no_grad():
            model.cls.seq_relationship.bias.copy_(torch.tensor([-99.0, 99.0]))
    for directory in CHECKPOINTS[family]:
        shutil.copytree(tokenizer, directory)
        model.save_pretrained(directory)


def _run(statements: list[str], package: str) -> dict[str, Any]:
    """Run statements with the classes of a package; the names they leave, and the value of each bare expression."""
    names: dict[str, Any] = {"shown": []}
    for number, statement in enumerate(statements):
        source = statement.replace("from transformers import", f"from {package} import")
        try:
            code = compile(source.strip(), f"statement {number}", "eval")
        except SyntaxError:
            exec(compile(source, f"statement {number}", "exec"), names)
        else:
            names["shown"].append(eval(code, names))
    return names


def _equal(ours: Any, theirs: Any, name: str) -> int:
    """Compare what both have left under a name; how many tensors that were."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text: f"{name}: {text}")
        return 1
    if isinstance(theirs, (float, int, str, list)):
        assert ours == (pytest.approx(theirs, abs=0.02) if isinstance(theirs, float) else theirs), name
    elif isinstance(theirs, transformers.utils.ModelOutput):
        names = [key for key, value in theirs.items() if isinstance(value, torch.Tensor)]
        assert type(ours).__name__ == type(theirs).__name__
        return sum(_equal(ours[key], theirs[key], f"{name}.{key}") for key in names)
    return 0


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_runs_and_gives_what_transformers_gives(name, tokenizers, tmp_path, monkeypatch):
    statements = _examples(name)
    assert len(statements) == STATEMENTS[name]
    monkeypatch.chdir(tmp_path)
    if name.endswith("Config"):  # of the published size, which needs no memory there
        with torch.device("meta"):
            ours, theirs = (_run(statements, package) for package in ("megatron_bert", "transformers"))
        assert isinstance(ours["configuration"], getattr(megatron_bert, name))
        assert ours["model"].num_parameters() == theirs["model"].num_parameters()
        return
    _write_checkpoints(name, tokenizers[_family(name)])
    mask = AutoTokenizer.from_pretrained(tokenizers[_family(name)]).mask_token
    statements = [statement.replace("<mask>", mask) for statement in statements]
    ours, theirs = (_run(statements, package) for package in ("megatron_bert", "transformers"))
    assert type(ours["model"]) is getattr(megatron_bert, name)
    assert ours.keys() == theirs.keys()
    for number, (mine, other) in enumerate(zip(ours["shown"], theirs["shown"], strict=True)):
        _equal(mine, other, f"value {number}")
    assert sum(_equal(ours[key], theirs[key], key) for key in theirs if not key.startswith("__")) >= 1


def test_every_documented_class_is_in_the_table():
    names = [name for name in megatron_bert.__all__ if name.startswith(("MegatronBert", "IBert"))]
    assert sorted(STATEMENTS) == [name for name in names if not name.endswith("PreTrainedModel")]
    assert sum(STATEMENTS.values()) == 201
