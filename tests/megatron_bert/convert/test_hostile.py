# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile files: a clear error each, and nothing run, written or left behind."""

from __future__ import annotations

import collections
import datetime
import functools
import io
import os
import pickle
import signal
import stat
import struct
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bert.convert import conversion
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.inspection import inspect
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import ReadOptions, WriteOptions
from parallel.errors import UserError
from parallel.stored.pickles import Limits, load_pickle
from parallel.stored.torch_vocabulary import torch_vocabulary
from parallel.stored.vocabulary import Vocabulary
from tests.megatron_bert.convert.generator import Sizes, arguments, draw, write_checkpoint, write_zip
from tests.megatron_bert.convert.support import all_tensors
from tools import fuzz_checkpoints as fuzz
from tools.fuzzing import payloads

SIZES = Sizes()
_SHARD = "release/mp_rank_00/model_optim_rng.pt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fuzz.make_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_corpus_is_readable(corpus: list[Path]) -> None:
    for place in corpus:
        fuzz.read_to_the_end(place)


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_mutations_end_in_clear_errors(corpus: list[Path], tmp_path: Path, start: int) -> None:
    failures = []
    for number in range(start, start + 50):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, what = fuzz.run_case(corpus[number % len(corpus)], folder, number)
        if outcome not in ("fine", "refused"):
            failures.append(f"case {number}, {what}: {outcome}")
    assert not failures


def test_no_payload_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "model_optim_rng.pt"
    for payload in payloads(canary):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", payload)
            file.writestr("archive/version", "3\n")
        with pytest.raises(UserError):
            inspect(path)
        assert not canary.exists()


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
        (b"\x80\x02csubprocess\nPopen\n.", "subprocess.Popen"),
        (b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.", "builtins.getattr of something that is not an enumeration"),
        (b"c__builtin__\ngetattr\n(tR.", "__builtin__.getattr of something"),
        (b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__call__'\ntR.", "builtins.getattr of something"),
        (b"cbuiltins\ngetattr\n(cos\nsystem\nS'b'\ntR.", "os.system"),
    ],
)
def test_what_a_pickle_asks_for_is_named(payload: bytes, name: str) -> None:
    with pytest.raises(UserError, match=f"asks to load {name}.*nothing was run"):
        load_pickle(io.BytesIO(payload), Vocabulary(), "file")


def put_beside_the_arguments(folder: Path, pickled: bytes) -> Path:
    """A checkpoint to whose dictionary the pickle adds, by opcodes that leave it on the stack."""
    path = write_checkpoint(folder, draw(SIZES), SIZES) / _SHARD
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    prefix = next(name for name in members if name.endswith("data.pkl"))
    members[prefix] = members[prefix].removesuffix(b".") + pickled + b"."
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_classes_of_megatron_are_inert(tmp_path: Path) -> None:
    # As saved from a run: a loss scaler in the optimizer, an enumeration among the arguments.
    scaler = (
        b"X\x06\x00\x00\x00scaler" + b"cmegatron.fp16.loss_scaler\nDynamicLossScaler\n)\x81}X\x01\x00\x00\x00aK\x01sb"
    )
    kind = b"X\x04\x00\x00\x00kind" + b"cmegatron.model.enums\nAttnMaskType\nK\x01\x85R"
    assert all_tensors(put_beside_the_arguments(tmp_path, scaler + b"s" + kind + b"s"))


@pytest.mark.parametrize(
    "payload",
    [
        b"csignal\nSIGTERM\n",
        b"c__builtin__\ngetattr\n(cmegatron.model.enums\nAttnMaskType\nS'causal'\ntR",
        b"c_operator\nor_\n(cbuiltins\ngetattr\n(capex.F\nG\nS'a'\ntRcbuiltins\ngetattr\n(capex.F\nG\nS'b'\ntRtR",
    ],
)
def test_enumerations_as_the_first_python_3_11_pickles_them(tmp_path: Path, payload: bytes) -> None:
    assert all_tensors(put_beside_the_arguments(tmp_path, b"X\x04\x00\x00\x00kind" + payload + b"s"))


@pytest.mark.parametrize(
    "value",
    [
        datetime.timedelta(seconds=3),
        datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        collections.deque([1, 2], maxlen=3),
        types.SimpleNamespace(a=1),
        collections.Counter("ab"),
        functools.partial(int, base=2),
        functools.partial(torch.nn.init.normal_, std=0.02),
        slice(1, 2),
        range(3),
        {1, 2},
        collections.defaultdict(list, a=[1]),
        Path("a"),
        signal.SIGTERM,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_objects_among_the_arguments_are_no_reason_to_refuse(
    tmp_path: Path, value: object, protocol: int
) -> None:
    path = write_checkpoint(tmp_path, draw(SIZES), SIZES) / _SHARD
    content = torch.load(path, weights_only=False)
    content["args"].later = value
    torch.save(content, path, pickle_protocol=protocol)
    assert all_tensors(path)


_LONG_LIST = b"](" + b"N" * 1000 + b"eq\x00"
_TEXT = b"X\x00\x10\x00\x00" + b"a" * 4096


@pytest.mark.parametrize(
    "content",
    [
        b"\x8f" * 30_000,
        b"}" * 30_000,
        b"]" * 30_000,
        b"K\x01\x85" * 30_000,
        b"N" + b"".join(b"r" + struct.pack("<I", 7 * n) for n in range(1, 30_000)),
        b"".join(b"J" + struct.pack("<i", n) for n in range(100_000, 150_000)),
        b"cmegatron.a\nb\nq\x00" + b"h\x00)\x81" * 30_000,
        _LONG_LIST + b"c__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R" * 10_000,
        b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(1000)) + b"uq\x00"
        b"cargparse\nNamespace\nq\x01" + b"h\x01)\x81h\x00b" * 10_000,
        _TEXT * 500,
        b"\x8b\x00\x00\x04\x00" + b"\x7f" * (1 << 18) + b"2" * 150_000,
    ],
    ids=["set", "dict", "list", "tuple", "memo", "int", "object", "call", "namespace", "text", "long"],
)
def test_a_pickle_fills_no_more_memory_than_it_may(content: bytes) -> None:
    file = io.BytesIO(b"\x80\x02" + content + b".")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="fills more memory than its size explains"):
            load_pickle(file, torch_vocabulary(str), "file", Limits(opcodes=20_000_000, memory=1 << 20))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"\x8f" * 600_000, b"]\x94" * 1_200_000], ids=["sets", "remembered lists"])
def test_a_short_archive_of_a_long_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x04" + content + b".")
        file.writestr("archive/version", "3\n")
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_SHARD, inner.getvalue())
    assert (tmp_path / "model.zip").stat().st_size < 8000
    with pytest.raises(UserError, match="fills more memory than its size explains"):
        inspect(tmp_path / "model.zip")


def _archive(path: Path, add: Callable[[zipfile.ZipFile], None]) -> Path:
    buffer = io.BytesIO()
    torch.save({"model": {}}, buffer)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_SHARD, buffer.getvalue())
        add(file)
    return path


def _link(file: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("release/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    file.writestr(info, "/etc/passwd")


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda file: file.writestr("../escape.txt", "x"), "reaches outside"),
        (lambda file: file.writestr("/absolute.txt", "x"), "reaches outside"),
        (lambda file: file.writestr("a/../../b.txt", "x"), "reaches outside"),
        (lambda file: file.writestr("a\\..\\..\\b.txt", "x"), "reaches outside"),
        (lambda file: file.writestr("C:/b.txt", "x"), "reaches outside"),
        (_link, "symbolic link"),
        (lambda file: file.writestr("bomb", bytes(100 << 20)), "would unpack to"),
        (lambda file: file.writestr("a", "x", zipfile.ZIP_LZMA), "unusual compression"),
    ],
)
def test_archives_that_reach_outside_or_explode_are_refused(
    tmp_path: Path, add: Callable[[zipfile.ZipFile], None], message: str
) -> None:
    before = set(Path(tmp_path).parent.iterdir())
    with pytest.raises(UserError, match=message):
        inspect(_archive(tmp_path / "model.zip", add))
    assert set(Path(tmp_path).parent.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


def test_truncated_archives_are_refused_wherever_they_end(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ngc", draw(SIZES), SIZES)
    archive = write_zip(tmp_path / "ngc.zip", folder, compressed=False)
    content = archive.read_bytes()
    for end in (0, 10, 1000, len(content) // 2, len(content) - 30, len(content) - 1):
        archive.write_bytes(content[:end])
        with pytest.raises(UserError):
            all_tensors(archive)


def test_a_flipped_bit_of_a_weight_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, draw(SIZES), SIZES) / _SHARD
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<f", float(draw(SIZES)["position"][0, 0])))
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum does not match"):
        all_tensors(path)


# ---------------------------------------------------------------- checkpoints that do not fit together


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(checkpoint_version=2.5), r"version 2.5, but only 0, 1.0, 2.0 and 3.0 are known"),
        (lambda c: c.update(checkpoint_version=2.0), r"mp_rank_01.* has checkpoint_version 2.0, but .*mp_rank_00"),
        (lambda c: c.update(iteration=8), r"has iteration 8, but"),
        (lambda c: c["model"]["lm_head"].pop("bias"), r"holds masked_head.bias, but .* does not"),
        (lambda c: c["model"]["lm_head"].update(bias=torch.zeros(7)), r"lm_head.bias is \[7\] .*, but .* is \[128\]"),
        (lambda c: c["model"]["lm_head"].update(extra=torch.zeros(7)), "lm_head.extra, which no BERT model"),
        (lambda c: c["model"].update(language_model={}), "holds embeddings.position_embeddings.weight, but"),
        (lambda c: c.pop("model"), "iteration|expected tensors"),
        (lambda c: setattr(c["args"], "num_layers", 6), "has num_layers 6, but"),
    ],
)
def test_shards_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    write_checkpoint(tmp_path, draw(SIZES), SIZES, tensor=2)
    for rank in ("mp_rank_00", "mp_rank_01") if "2.5" in message else ("mp_rank_01",):
        _edit(tmp_path / "release" / rank / "model_optim_rng.pt", change)
    with pytest.raises(UserError, match=message):
        all_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw(SIZES), SIZES, tensor=2, pipeline=2)
    (tmp_path / "release/mp_rank_01_000/model_optim_rng.pt").unlink()
    with pytest.raises(UserError, match=r"lacks release/mp_rank_01_000/model_optim_rng.pt"):
        inspect(tmp_path)
    (tmp_path / "release/mp_rank_01_001/model_optim_rng.pt").unlink()
    with pytest.raises(UserError, match="was saved at tensor size 2, but there are files of 1"):
        inspect(tmp_path)


def test_vocabulary_tensors_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw(SIZES), SIZES, args=None)
    _edit(tmp_path / _SHARD, lambda c: c["model"]["lm_head"].update(bias=torch.zeros(90)))
    with pytest.raises(UserError, match="128 rows of word embeddings but 90 vocabulary biases"):
        inspect(tmp_path, ReadOptions(num_attention_heads=4))


def test_an_output_matrix_that_is_not_a_copy_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw(SIZES), SIZES, pipeline=2)
    _edit(
        tmp_path / "release/mp_rank_00_001/model_optim_rng.pt",
        lambda c: c["model"]["word_embeddings_for_head"]["weight"].mul_(2),
    )
    with pytest.raises(UserError, match=r"word_embeddings_for_head.weight should be a copy"):
        all_tensors(tmp_path)


def test_norms_that_drifted_apart_are_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw(SIZES), SIZES, tensor=2)
    _edit(
        tmp_path / "release/mp_rank_01/model_optim_rng.pt",
        lambda c: c["model"]["language_model"]["encoder"]["final_layernorm.weight"].mul_(1.001),
    )
    with open_checkpoint(tmp_path) as state:
        state["encoder.final_norm.weight"].load()
        assert "final_layernorm.weight differs" in state.warnings[0]


@pytest.mark.parametrize("key", ["apply_residual_connection_post_layernorm", "swiglu"])
def test_other_architectures_are_refused(tmp_path: Path, key: str) -> None:
    args = arguments(SIZES, 1, 1)
    setattr(args, key, True)
    write_checkpoint(tmp_path, draw(SIZES), SIZES, args=args)
    with pytest.raises(UserError, match=f"{key}"):
        inspect(tmp_path)


def test_post_layer_norm_bert_is_refused_with_the_reason(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "bert")
    for to in ("megatron", "megatron-core"):
        with pytest.raises(UserError, match=r"is of a bert model, which normalizes after each sum \(post-layer-norm\)"):
            convert(tmp_path / "bert", tmp_path / "result", to=to)
    text = (tmp_path / "bert" / "config.json").read_text().replace('"bert"', '"megatron-bert"')
    (tmp_path / "bert" / "config.json").write_text(text)
    with pytest.raises(UserError, match="post-layer-norm BERT"):
        inspect(tmp_path / "bert")


# ---------------------------------------------------------------- nothing half-written


def test_a_failed_conversion_leaves_nothing_and_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", draw(SIZES), SIZES)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for to, write in (
        ("huggingface", WriteOptions()),
        ("megatron", WriteOptions(tensor=2)),
        ("native", WriteOptions()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(conversion.tqdm, "update", interrupt)
            with pytest.raises(KeyboardInterrupt):
                convert(source, tmp_path / "result", to=to, write=write)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    convert(source, tmp_path / "result", to="huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "source"]


@pytest.mark.parametrize(
    ("to", "write", "message"),
    [
        ("megatron", WriteOptions(tensor=3), "--tensor 3 does not divide the 4 attention heads"),
        ("megatron", WriteOptions(pipeline=3), "does not divide the 4 layers"),
        ("megatron", WriteOptions(virtual_stages=2), "needs --pipeline of 2 or more"),
        ("megatron", WriteOptions(checkpoint_version=2.5), "only 0, 1.0, 2.0 and 3.0 are known"),
        ("megatron-core", WriteOptions(checkpoint_version=0.0), "one order of rows only"),
        ("huggingface", WriteOptions(tensor=2), "divide Megatron's files"),
        ("huggingface", WriteOptions(checkpoint_version=0.0), "is Megatron's"),
        ("nemo", WriteOptions(), "choose one of native, huggingface, megatron-core, megatron"),
    ],
)
def test_wishes_that_cannot_be_met(tmp_path: Path, to: str, write: WriteOptions, message: str) -> None:
    source = write_checkpoint(tmp_path / "source", draw(SIZES), SIZES)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "result", to=to, write=write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_things_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": {}}))
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    os.mkfifo(tmp_path / "pipe")
    for name in ("text.pt", "pickle.pt", "empty", "list.pt", "missing", "pipe"):
        with pytest.raises(UserError):
            inspect(tmp_path / name)
