# SPDX-License-Identifier: Apache-2.0
"""Names of the hub: models in its local cache, and what an upload sends, without a network."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import _http

from megatron_bert import AutoTokenizer, IBertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.ibert import QuantizationConfig, calibrate, named_ranges, quantize_model
from megatron_bert.ibert.family import save_ranges
from tests.megatron_bert.family.support import CLOSE, batch_for, build
from tests.megatron_bert.ibert.family import support as ibert

NAME = "someone/small"
#: Revision -> commit.
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def _publish(cache: Path, revision: str, folder: Path) -> None:
    """Put a directory into a cache as huggingface_hub keeps a downloaded revision of it."""
    place = cache / f"models--{NAME.replace('/', '--')}"
    commit = COMMITS[revision]
    for path in (file for file in folder.rglob("*") if file.is_file()):
        blob = place / "blobs" / f"{commit[0]}{len(list(place.glob('blobs/*'))):039x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = place / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(commit)


def _other(head: str) -> Any:
    """A model with other weights."""
    model = build(head)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with two revisions of a model; the newer one is in shards, and below it is one of another kind."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("new")
    build("ForMaskedLM").save_pretrained(folder, max_shard_size="30KB")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "dog"]) + "\n")
    save_tokenizer(load_tokenizer(folder), folder, 20)
    _other("ForMaskedLM").save_pretrained(folder / "below")
    _publish(cache, "main", folder)
    old = tmp_path_factory.mktemp("old")
    _other("ForMaskedLM").to(torch.bfloat16).save_pretrained(old)
    _publish(cache, "v1", old)
    return cache


def _same(one: Any, other: Any) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(tensor.equal(yours[name].to(tensor)) for name, tensor in mine.items())


def test_names_revisions_and_folders(cache):
    where = {"cache_dir": cache, "local_files_only": True}
    assert _same(MegatronBertForMaskedLM.from_pretrained(NAME, **where), build("ForMaskedLM"))
    assert _same(MegatronBertForMaskedLM.from_pretrained(NAME, revision=COMMITS["main"], **where), build("ForMaskedLM"))
    for revision in ("v1", COMMITS["v1"]):
        old = MegatronBertForMaskedLM.from_pretrained(NAME, revision=revision, **where)
        assert old.dtype == torch.bfloat16
        assert _same(old, _other("ForMaskedLM").to(torch.bfloat16))
    assert _same(MegatronBertForMaskedLM.from_pretrained(NAME, subfolder="below", **where), _other("ForMaskedLM"))
    config = MegatronBertConfig.from_pretrained(NAME, **where)
    assert config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(NAME, **where)("Hello dog")["input_ids"] == [2, 5, 6, 3]


@pytest.mark.parametrize("given", [{"revision": "v2"}, {"subfolder": "above"}, {}], ids=str)
def test_what_is_not_in_the_cache(given, cache):
    name = NAME if given else "someone/else"
    with pytest.raises(OSError, match=r"config\.json|find them in the cached files"):
        MegatronBertForMaskedLM.from_pretrained(name, cache_dir=cache, local_files_only=True, **given)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu"), "low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa", "low_cpu_mem_usage": False},
        {"dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16", "device_map": "auto", "attn_implementation": "eager"},
        {"dtype": "auto", "use_safetensors": True, "force_download": False, "token": False},
    ],
    ids=str,
)
def test_options_of_loading(options, cache):
    model, info = MegatronBertForMaskedLM.from_pretrained(
        NAME, cache_dir=cache, local_files_only=True, output_loading_info=True, **options
    )
    assert not any(info.values())
    narrow = "bfloat16" in str(options)
    assert model.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert model.config._attn_implementation == options.get("attn_implementation", "sdpa")
    close = {"rtol": 0.1, "atol": 0.3} if narrow else CLOSE
    batch = batch_for("ForMaskedLM")
    torch.testing.assert_close(model(**batch).logits.float(), build("ForMaskedLM")(**batch).logits, **close)


def test_quantized_models_keep_their_ranges(tmp_path, caplog):
    """Integers of I-BERT by name; a MegatronBERT class says what it leaves out."""
    model = ibert.build("ForMaskedLM", ibert.config_of("ForMaskedLM", quant_mode=True))
    model.train()
    model(**ibert.batch_for("ForMaskedLM"))
    model.eval().save_pretrained(tmp_path / "integers")
    _publish(tmp_path / "cache", "main", tmp_path / "integers")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = IBertForMaskedLM.from_pretrained(NAME, **where)
    assert named_ranges(loaded) == named_ranges(model) != {}
    batch = ibert.batch_for("ForMaskedLM")
    assert loaded(**batch).logits.equal(model(**batch).logits)

    other = quantize_model(build("ForMaskedLM"), QuantizationConfig())
    calibrate(other, [batch_for("ForMaskedLM")], lambda batch: other(**batch))
    other.save_pretrained(tmp_path / "megatron")
    save_ranges(other, tmp_path / "megatron")
    _publish(tmp_path / "cache", "v1", tmp_path / "megatron")
    MegatronBertForMaskedLM.from_pretrained(NAME, revision="v1", **where)
    assert "is a quantized model, loaded in floating point without its quantization.json" in caplog.text


@contextmanager
def _connected_to(
    answer: Callable[[httpx2.Request], httpx2.Response], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Let huggingface_hub's requests be answered by a function while the block lasts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = _http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(before)


def _no_connection(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("no route to host", request=request)


def test_without_a_connection_the_cache_is_all_there_is(cache, monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its tries
    with _connected_to(_no_connection, monkeypatch):
        assert _same(MegatronBertForMaskedLM.from_pretrained(NAME, cache_dir=cache), build("ForMaskedLM"))


class Hub:
    """The answers of a hub to an upload, and the files that it was sent."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.files: dict[str, bytes] = {}
        self.message = ""

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.requests.append(f"{request.method} {path}")
        assert request.headers.get("authorization", "Bearer hf_small") == "Bearer hf_small"
        if path.endswith("/repos/create"):
            return httpx2.Response(200, json={"url": f"https://huggingface.co/{NAME}", "id": NAME, "name": NAME})
        if path.endswith("/validate-yaml"):
            return httpx2.Response(200, json={"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(request.read())["files"]
            return httpx2.Response(
                200, json={"files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        if "/commit/" in path:
            for line in request.read().splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    self.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                else:
                    self.message = part["value"]["summary"]
            address = f"https://huggingface.co/{NAME}/commit/{COMMITS['main']}"
            return httpx2.Response(200, json={"commitUrl": address, "commitOid": COMMITS["main"]})
        return httpx2.Response(404, headers={"x-error-code": "EntryNotFound"}, request=request)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    with _connected_to(hub.answer, monkeypatch):
        yield hub


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "integers"])
def test_uploads_are_whole(by, quantized, hub, tmp_path):
    """All that a saved directory holds is sent, and loads as it does; older files there are not sent again."""
    model = ibert.build("ForMaskedLM", ibert.config_of("ForMaskedLM", quant_mode=quantized))
    if quantized:
        model.train()
        model(**ibert.batch_for("ForMaskedLM"))
        model.eval()
    if by == "push_to_hub":
        model.push_to_hub(NAME, token="hf_small", commit_message="small", max_shard_size="30KB", tags=["integers"])
    else:
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "notes.txt").write_text("of my own")
        model.add_model_tags("integers")
        hub_options = {"push_to_hub": True, "repo_id": NAME, "token": "hf_small", "commit_message": "small"}
        model.save_pretrained(tmp_path / "local", max_shard_size="30KB", **hub_options)
    model.save_pretrained(tmp_path / "expected", max_shard_size="30KB")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert hub.message == "small"
    assert b"integers" in hub.files.pop("README.md")
    assert hub.files.keys() == expected.keys()
    assert all(hub.files[name] == data for name, data in expected.items() if name != "config.json")
    assert ("quantization.json" in hub.files) == quantized
    assert any(request.startswith("POST /api/models/someone/small/commit/main") for request in hub.requests)
    (tmp_path / "received").mkdir()
    for name, data in hub.files.items():
        (tmp_path / "received" / name).write_bytes(data)
    batch = ibert.batch_for("ForMaskedLM")
    assert IBertForMaskedLM.from_pretrained(tmp_path / "received")(**batch).logits.equal(model(**batch).logits)


def test_configurations_and_tokenizers_are_uploaded_alone(hub):
    build("Model").config.push_to_hub(NAME, token="hf_small")
    assert json.loads(hub.files["config.json"])["hidden_size"] == 32
