# SPDX-License-Identifier: Apache-2.0
"""Chains of conversions return the first tensors bit for bit, and transformers computes the same from their result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bert.convert.conversion import convert
from megatron_bert.convert.inspection import inspect
from megatron_bert.convert.options import ReadOptions, WriteOptions
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, draw, forward, write_checkpoint, write_zip
from tests.megatron_bert.convert.support import (
    all_tensors,
    assert_same_logits,
    assert_same_tensors,
    logits_of,
    make_inputs,
)

SIZES = Sizes()
_HEADS = ReadOptions(num_attention_heads=SIZES.heads)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An NGC-like archive: first names, no version, no arguments, half precision."""
    folder = write_checkpoint(
        tmp_path / "ngc", draw(SIZES, dtype=torch.float16), SIZES, era="transformer", version=None, args=None
    )
    return write_zip(tmp_path / "ngc.zip", folder)


def test_chain_over_all_formats_is_lossless(tmp_path: Path, archive: Path) -> None:
    first = all_tensors(archive, num_attention_heads=SIZES.heads)
    steps: list[tuple[str, str, WriteOptions]] = [
        ("native", "native", WriteOptions()),
        ("modern", "megatron", WriteOptions(tensor=4, checkpoint_version=3.0)),
        ("huggingface", "huggingface", WriteOptions()),
        ("core", "megatron-core", WriteOptions(tensor=2, pipeline=2, virtual_stages=2, norms="fused")),
        ("one", "megatron", WriteOptions(tensor=2, pipeline=4, checkpoint_version=1.0)),
        ("back.zip", "megatron", WriteOptions(checkpoint_version=0.0)),
    ]
    source, options = archive, _HEADS
    for name, to, write in steps:
        convert(source, tmp_path / name, to=to, read=options, write=write)
        source, options = tmp_path / name, ReadOptions()
        assert_same_tensors(all_tensors(source), first)
    # The archive at the end holds the very tensors of the first one, in the same places.
    assert_same_tensors(_raw(tmp_path / "back.zip", tmp_path), _raw(archive, tmp_path))


def _raw(archive: Path, scratch: Path) -> dict[str, Tensor]:
    import tempfile
    import zipfile

    with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = file.extract("release/mp_rank_00/model_optim_rng.pt", folder)
        content = torch.load(path, weights_only=False)
    found: dict[str, Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[prefix] = value
        else:
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)

    walk("model", content["model"])
    return dict(sorted(found.items()))


@pytest.mark.parametrize("to", ["megatron", "megatron-core"])
@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 2)])
def test_resizing_in_any_direction(tmp_path: Path, to: str, tensor: int, pipeline: int, virtual: int) -> None:
    weights = draw(SIZES)
    source = write_checkpoint(tmp_path / "source", weights, SIZES, tensor=2, pipeline=2)
    read = ReadOptions(true_vocab_size=SIZES.words)
    write = WriteOptions(tensor=tensor, pipeline=pipeline, virtual_stages=virtual)
    convert(source, tmp_path / "result", to=to, read=read, write=write)
    assert_same_tensors(all_tensors(tmp_path / "result"), all_tensors(source, true_vocab_size=SIZES.words))
    layout = dict(inspect(tmp_path / "result").rows)["layout"]
    assert layout.startswith(f"tensor {tensor} x pipeline {pipeline}")
    inputs = make_inputs(SIZES)
    assert_same_logits(logits_of(tmp_path / "result", SIZES), forward(weights, *inputs), inputs[2])


@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
def test_written_rows_are_where_their_version_has_them(tmp_path: Path, version: float) -> None:
    weights = draw(SIZES)
    era = "encoder" if version == 3.0 else "transformer"
    expected = write_checkpoint(tmp_path / "expected", weights, SIZES, era=era, version=version, tensor=2)
    source = write_checkpoint(tmp_path / "source", weights, SIZES, era="core")
    write = WriteOptions(tensor=2, checkpoint_version=version)
    read = ReadOptions(true_vocab_size=SIZES.words)
    convert(source, tmp_path / "result", to="megatron", read=read, write=write)
    for rank in ("mp_rank_00", "mp_rank_01"):
        ours, theirs = (
            torch.load(folder / "release" / rank / "model_optim_rng.pt", weights_only=False)
            for folder in (tmp_path / "result", expected)
        )
        stack = "encoder" if version == 3.0 else "transformer"
        ours, theirs = (content["model"]["language_model"][stack] for content in (ours, theirs))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("shards", [False, True])
def test_transformers_computes_the_same(tmp_path: Path, gelu: str, shards: bool) -> None:
    transformers = pytest.importorskip("transformers")
    weights = draw(SIZES)
    source = write_checkpoint(tmp_path / "source", weights, SIZES, tensor=2)
    read = ReadOptions(true_vocab_size=SIZES.words, gelu=gelu, layer_norm_eps=1e-4)
    write = WriteOptions(max_shard_bytes=4000 if shards else 10**9)
    convert(source, tmp_path / "hf", to="huggingface", read=read, write=write)
    assert (tmp_path / "hf/model.safetensors.index.json").is_file() == shards
    model, report = transformers.MegatronBertForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.layer_norm_eps == 1e-4
    tokens, types, mask = make_inputs(SIZES)
    with torch.no_grad():
        output = model.double()(input_ids=tokens, token_type_ids=types, attention_mask=mask.long())
    expected = forward(weights, tokens, types, mask, eps=1e-4, gelu=gelu)
    assert_same_logits((output.prediction_logits, output.seq_relationship_logits), expected, mask)


@pytest.mark.parametrize("safe", [True, False])
def test_files_of_transformers_are_read(tmp_path: Path, safe: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MegatronBertConfig(
        vocab_size=90,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.3,
        layer_norm_eps=1e-5,
    )
    model = transformers.MegatronBertForPreTraining(config).eval()
    if safe:
        model.save_pretrained(tmp_path)
    else:
        config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    tokens, types, mask = make_inputs(SIZES)
    with torch.no_grad():
        output = model.double()(input_ids=tokens, token_type_ids=types, attention_mask=mask.long())
    expected = (output.prediction_logits, output.seq_relationship_logits)
    assert_same_logits(logits_of(tmp_path, SIZES), expected, mask)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_activations_that_megatron_has_not(tmp_path: Path, act: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.MegatronBertConfig(vocab_size=90, **sizes, hidden_act=act)
    transformers.MegatronBertForPreTraining(config).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "native", to="native")
    assert ("activation", act) in inspect(tmp_path / "native").rows
    convert(tmp_path / "native", tmp_path / "out", to="huggingface")
    assert transformers.MegatronBertConfig.from_pretrained(tmp_path / "out").hidden_act == act
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "in"))
    for to in ("megatron", "megatron-core"):
        with pytest.raises(UserError, match=f"has hidden_act {act}, but Megatron's BERT computes GELU"):
            convert(tmp_path / "in", tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


def test_encoder_of_transformers_without_heads_keeps_its_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MegatronBertConfig(
        vocab_size=90, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    transformers.MegatronBertModel(config).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "native", to="native")
    convert(tmp_path / "native", tmp_path / "out", to="huggingface")
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "MegatronBertModel"
    assert not any(report.values()), report
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "in"))


@pytest.mark.parametrize("padding", [None, 3])
def test_padding_stays_what_it_is(tmp_path: Path, padding: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.MegatronBertConfig(vocab_size=90, **sizes, pad_token_id=padding)
    transformers.MegatronBertForPreTraining(config).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "native", to="native")
    convert(tmp_path / "native", tmp_path / "out", to="huggingface")
    assert transformers.MegatronBertConfig.from_pretrained(tmp_path / "out").pad_token_id == padding


def test_half_precision_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = draw(SIZES)
    weights["final"]["weight"][0] = 1e6
    source = write_checkpoint(tmp_path / "source", weights, SIZES)
    with pytest.raises(ValueError, match=r"encoder.final_norm.weight .* too large for torch.float16"):
        convert(source, tmp_path / "hf", to="huggingface", write=WriteOptions(dtype="float16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    convert(source, tmp_path / "hf", to="huggingface", write=WriteOptions(dtype="bfloat16"))
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "hf").values()} == {torch.bfloat16}
