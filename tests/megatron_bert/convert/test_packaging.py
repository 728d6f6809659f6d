# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as other tools pack them, and what people give by mistake."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_bert.convert.conversion import convert
from megatron_bert.convert.inspection import inspect
from megatron_bert.convert.options import ReadOptions
from parallel.errors import UserError
from tests.megatron_bert.convert.generator import Sizes, draw, shard, write_checkpoint, write_zip
from tests.megatron_bert.convert.support import all_tensors, assert_same_tensors

SIZES = Sizes(layers=2)
_SHARD = "release/mp_rank_00/model_optim_rng.pt"
_LEGACY_CODE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "layernorm_epsilon": 1e-5}
_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 672000000\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), draw(SIZES), SIZES)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, torch.Tensor]:
    return all_tensors(source)


def _model(version: float = 3.0, rank: int = 0, tensor: int = 1, era: str = "encoder") -> dict[str, Any]:
    """The ``model`` dictionary of one tensor rank."""
    layers = range(SIZES.layers)
    return shard(draw(SIZES), SIZES, era, version, layers, rank=rank, tensor=tensor, first=True, last=True, copy=False)


def _flat(prefix: str, value: Any) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    return {name: t for key, inner in value.items() for name, t in _flat(f"{prefix}.{key}", inner).items()}


@pytest.mark.parametrize("to", ["huggingface", "native"])
@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_the_folder_of_a_model_in_an_archive(
    kind: str, to: str, source: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert(source, tmp_path / "model", to=to)
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path, "model")
    assert_same_tensors(all_tensors(Path(archive)), expected)


# ---------------------------------------------------------------- NeMo


def _write_nemo(folder: Path, *, tensor: int = 1, prefix: str = "model", era: str = "encoder", **settings: Any) -> Path:
    """A NeMo model, unpacked."""
    version = 0.0 if settings.get("megatron_legacy") else 3.0
    for rank in range(tensor):
        place = folder / (f"mp_rank_{rank:02d}" if tensor > 1 else "") / "model_weights.ckpt"
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_flat(prefix, _model(version, rank, tensor, era)), place)
    values = {"target": "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel"}
    text = yaml.safe_dump(values | _LEGACY_CODE | {"tensor_model_parallel_size": tensor} | settings)
    (folder / "model_config.yaml").write_text(text)
    return folder


def _pack(folder: Path, archive: Path, mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(archive, mode, format=kind) as file:  # type: ignore[call-overload]
        file.add(folder, arcname=".")
    return archive


@pytest.mark.parametrize(
    ("tensor", "options"),
    [
        (1, {}),
        (2, {}),
        (1, {"megatron_legacy": True}),
        (1, {"prefix": "model.module"}),
        (1, {"era": "core"}),
        (1, {"normalization": "layernorm", "transformer_block_type": "pre_ln", "position_embedding_type": None}),
    ],
)
def test_nemo_models_packed_and_unpacked(
    tmp_path: Path, expected: dict[str, torch.Tensor], tensor: int, options: dict[str, Any]
) -> None:
    folder = _write_nemo(tmp_path / "nemo", tensor=tensor, **options)
    sources = [
        folder,
        _pack(folder, tmp_path / "model.nemo"),
        _pack(folder, tmp_path / "gnu.nemo", kind=tarfile.GNU_FORMAT),
        _pack(folder, tmp_path / "old.nemo", "w:gz"),
        *([folder / "model_weights.ckpt"] if tensor == 1 else []),
    ]
    words = ReadOptions(true_vocab_size=SIZES.words)
    for packed in sources:
        found = all_tensors(packed, true_vocab_size=SIZES.words)
        assert_same_tensors(found, {name: tensor[: len(found[name])] for name, tensor in expected.items()})
        rows = dict(inspect(packed, words).rows)
        assert (rows["attention heads"], rows["GELU"]) == ("4 of 4", "tanh")
        assert rows["layout"].startswith(f"tensor {tensor} x pipeline 1")


def test_nemo_weights_without_their_settings_ask_for_the_order_of_rows(tmp_path: Path) -> None:
    folder = _write_nemo(tmp_path)
    (folder / "model_config.yaml").unlink()
    with pytest.raises(UserError, match=r"without its model_config.yaml.*--source-checkpoint-version \(3.0, or 0"):
        inspect(folder / "model_weights.ckpt", ReadOptions(num_attention_heads=4))
    assert all_tensors(folder / "model_weights.ckpt", num_attention_heads=4, checkpoint_version=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": "nemo.collections.MegatronGPTModel"},
            "is of nemo.collections.MegatronGPTModel: only Megatron's BERT",
        ),
        ({"transformer_block_type": "post_ln"}, "has transformer_block_type post_ln: only pre_ln"),
        ({"normalization": "rmsnorm"}, "has normalization rmsnorm: only layernorm"),
        ({"num_layers": 24}, "says num_layers 24, but its tensors make it 2"),
    ],
)
def test_nemo_models_of_other_kinds(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect(_write_nemo(tmp_path, **settings))


@pytest.mark.parametrize("text", ["a: &a [1]\nb: *a\n", "a: [", "- 1", "\x00"])
def test_nemo_settings_that_are_none(tmp_path: Path, text: str) -> None:
    folder = _write_nemo(tmp_path)
    (folder / "model_config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"model_config.yaml (is not YAML|holds no settings)"):
        inspect(folder)


# ---------------------------------------------------------------- tar files of others


def _member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> Callable[[tarfile.TarFile], None]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    return lambda file: file.addfile(info, io.BytesIO(bytes(size)))


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (_member("../escape"), "reaches outside"),
        (_member("/absolute"), "reaches outside"),
        (_member("a/../../b"), "reaches outside"),
        (_member("link", tarfile.SYMTYPE), "a link or a special file"),
        (_member("hard", tarfile.LNKTYPE), "a link or a special file"),
        (_member("device", tarfile.CHRTYPE), "a link or a special file"),
        (_member("./model_config.yaml"), "two members of one name"),
    ],
)
def test_tar_files_that_reach_outside(tmp_path: Path, add: Callable[[tarfile.TarFile], None], message: str) -> None:
    archive = _pack(_write_nemo(tmp_path / "nemo"), tmp_path / "model.nemo")
    with tarfile.open(archive, "a") as file:
        add(file)
    with pytest.raises(UserError, match=message):
        inspect(archive)


def test_tar_files_cut_off_or_changed_anywhere(tmp_path: Path) -> None:
    archive = _pack(_write_nemo(tmp_path / "nemo"), tmp_path / "model.nemo")
    content = archive.read_bytes().rstrip(b"\0")
    for end in (512, 1000, len(content) // 2, len(content)):
        archive.write_bytes(content[:end])
        with pytest.raises(UserError, match="fetch it again"):
            inspect(archive)
    for at in (0, 100, 124, 130, 148, 156, 345):
        archive.write_bytes(content[:at] + b"\xff" + content[at + 1 :] + bytes(1024))
        with pytest.raises(UserError, match="fetch it again"):
            inspect(archive)


def test_a_compressed_tar_that_explodes(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(100 * gzip.compress(bytes(1 << 20)))
    with pytest.raises(UserError, match="would unpack to"):
        inspect(path)
    path.write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(UserError, match="one file that gzip compressed"):
        inspect(path)


# ---------------------------------------------------------------- DeepSpeed


def _write_deepspeed(folder: Path, step: int, tensor: int) -> None:
    place = folder / f"global_step{step}"
    place.mkdir(parents=True)
    for rank in range(tensor):
        content = {
            "module": _model(rank=rank, tensor=tensor),
            "optimizer": None,
            "lr_scheduler": None,
            "ds_version": "0.9",
        }
        content |= {"buffer_names": [], "checkpoint_version": 3.0, "iteration": step, "mp_world_size": tensor}
        torch.save(content, place / f"mp_rank_{rank:02d}_model_states.pt")
        torch.save({"optimizer_state_dict": {}}, place / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt")


@pytest.mark.parametrize("tensor", [1, 2])
def test_deepspeed_checkpoints(tmp_path: Path, expected: dict[str, torch.Tensor], tensor: int) -> None:
    for step in (10, 20):
        _write_deepspeed(tmp_path, step, tensor)
    with pytest.raises(UserError, match="several checkpoints"):
        inspect(tmp_path)
    (tmp_path / "latest").write_text("global_step20")
    options = {"num_attention_heads": 4, "true_vocab_size": SIZES.words}
    sources = [tmp_path, tmp_path / "global_step20"]
    if tensor == 1:
        sources.append(tmp_path / "global_step20/mp_rank_00_model_states.pt")
    for place in sources:
        found = all_tensors(place, **options)
        assert_same_tensors(found, {name: tensor[: len(found[name])] for name, tensor in expected.items()})
        assert ("step", "20") in inspect(place, ReadOptions(num_attention_heads=4)).rows


# ---------------------------------------------------------------- files beside, and archives inside


def test_files_beside_the_weights_are_not_taken_for_them(
    tmp_path: Path, source: Path, expected: dict[str, torch.Tensor]
) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00/model_optim_rng.pt").write_bytes((source / _SHARD).read_bytes())
    torch.save({0: {}}, tmp_path / "mp_rank_00/distrib_optim.pt")
    (tmp_path / "mp_rank_00/._model_optim_rng.pt").write_bytes(b"\0\5\x16\7")
    for place in (tmp_path, tmp_path / "mp_rank_00"):
        assert_same_tensors(all_tensors(place), expected)


@pytest.mark.parametrize("compressed", [False, True])
def test_archives_of_a_mac_and_archives_in_archives(
    tmp_path: Path, source: Path, expected: dict[str, torch.Tensor], compressed: bool
) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/model.pt").write_bytes((source / _SHARD).read_bytes())
    inner = write_zip(tmp_path / "inner.zip", tmp_path / "bert", compressed=compressed)
    with zipfile.ZipFile(inner, "a") as file:
        file.writestr("__MACOSX/._model.pt", b"\0\5\x16\7")
        file.writestr(".DS_Store", b"\0\0\0\1Bud1")
    assert_same_tensors(all_tensors(inner), expected)
    outer = tmp_path / "outer.zip"
    with zipfile.ZipFile(outer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        file.write(inner, "files/inner.zip")
        file.writestr("files/README.txt", "read me")
    assert_same_tensors(all_tensors(outer), expected)


def test_an_archive_in_an_archive_is_judged_by_the_weight_of_the_outer_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "inner.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.pt", bytes(60 << 20))
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(tmp_path / "inner.zip", "inner.zip")
        file.writestr("other", bytes(10 << 20))
    with pytest.raises(UserError, match="would unpack to"):
        inspect(tmp_path / "outer.zip")


# ---------------------------------------------------------------- what is not a checkpoint


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".pt"):
            torch.save({"args": None}, folder / name)
        else:
            (folder / name).write_bytes(b"\2\0\0\0\0\0\0\0{}")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            (".metadata", "common.pt", "metadata.json", "__0_0.distcp"),
            "megatron-core checkpoint of the torch_dist kind",
        ),
        (("iter_0000010/.metadata", "iter_0000010/common.pt"), "megatron-core checkpoint of the torch_dist kind"),
        (("common.pt", "metadata.json", "embedding.weight/.zarray"), "megatron-core checkpoint of the zarr kind"),
        (("mp_rank_00_model_states.pt", "layer_01-model_00-model_states.pt"), "DeepSpeed's pipeline engine"),
        (("zero_pp_rank_0_mp_rank_00_model_states.pt",), "ZeRO stage 3.*zero_to_fp32.py"),
        (("a.pt", "b.pt"), "several files that may be a model"),
        (("notes.txt",), "not a checkpoint of a kind that is known"),
        (("model.safetensors",), "model.safetensors has no config.json beside it"),
    ],
)
def test_packagings_that_are_not_read_are_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    _touch(tmp_path, *names)
    (tmp_path / "README").write_text("x")
    with pytest.raises(UserError, match=message):
        inspect(tmp_path)


_STRANGE = [
    (b"", "is empty: fetch it again"),
    (bytes(2000), "is full of zeros or blanks"),
    (_LFS.encode(), r"is a pointer of git-lfs to 672,000,000 bytes.*`git lfs pull`"),
    (b"\n<!DOCTYPE html><html><head>", "is a web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is an XML text"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
]


@pytest.mark.parametrize(("content", "message"), _STRANGE)
def test_files_that_are_something_else_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "hub").mkdir()
    for name in ("hub/config.json", "hub/model.safetensors", "model.pt"):
        (tmp_path / name).write_bytes(content)
    for place in (tmp_path / "model.pt", tmp_path / "hub"):
        with pytest.raises(UserError, match=message):
            inspect(place)
    (tmp_path / "hub/config.json").write_text('{"model_type": "megatron-bert"}')
    with pytest.raises(UserError, match=message):
        inspect(tmp_path / "hub")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"state": {}}}, "holds the state of an optimizer"),
        ({"bert.encoder.layer.0.ln.weight": torch.ones(2)}, "Hugging Face's names but no config.json"),
        ({"model": {"conv.weight": torch.ones(2)}}, "holds conv.weight: no model of a kind that is known"),
        ([1], "holds a list instead of a dictionary"),
    ],
)
def test_models_of_other_kinds(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        inspect(tmp_path / "model.pt")


# ---------------------------------------------------------------- what a checkpoint says of itself


@pytest.mark.parametrize("era", ["transformer", "encoder", "core"])
def test_a_gpt_is_not_taken_for_a_bert(tmp_path: Path, era: str) -> None:
    model = _model(era=era)
    for key in ("lm_head", "binary_head"):
        model.pop(key, None)
    for key in ("pooler", "embedding.tokentype_embeddings"):
        model.get("language_model", {}).pop(key, None)
    model.get("language_model", {}).get("embedding", {}).pop("tokentype_embeddings", None)
    gone = ("lm_head", "binary", "pooler", "output_layer", "embedding.tokentype")
    model = {key: value for key, value in model.items() if not key.startswith(gone)}
    torch.save({"model": model}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="is of Megatron's GPT or another decoder"):
        inspect(tmp_path / "model.pt", ReadOptions(num_attention_heads=4))


@pytest.mark.parametrize("version", [torch.tensor(3.0), torch.tensor([3]), np.float64(3.0), 3])
def test_checkpoint_versions_that_are_no_plain_number_are_read(
    tmp_path: Path, expected: dict[str, torch.Tensor], version: Any
) -> None:
    torch.save({"model": _model(), "checkpoint_version": version}, tmp_path / "model.pt")
    assert_same_tensors(all_tensors(tmp_path / "model.pt", num_attention_heads=4), expected)


@pytest.mark.parametrize("version", ["3.0", [3.0], True, torch.ones(2), 2.5])
def test_checkpoint_versions_that_mean_nothing_are_refused(
    tmp_path: Path, expected: dict[str, torch.Tensor], version: Any
) -> None:
    torch.save({"model": _model(), "checkpoint_version": version}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="--source-checkpoint-version"):
        inspect(tmp_path / "model.pt", ReadOptions(num_attention_heads=4))
    found = all_tensors(tmp_path / "model.pt", num_attention_heads=4, checkpoint_version=3.0)
    assert_same_tensors(found, expected)


def test_arguments_in_a_dictionary_are_read(tmp_path: Path) -> None:
    torch.save({"model": _model(), "args": {"num_attention_heads": 2}, "checkpoint_version": 3}, tmp_path / "model.pt")
    assert dict(inspect(tmp_path / "model.pt").rows)["attention heads"] == "2 of 8"
