# SPDX-License-Identifier: Apache-2.0
"""Fuzz the checkpoint readers: broken and hostile files end in a clear error, never in a traceback or executed code.

    python tools/fuzz_checkpoints.py --cases 5000 --seed 1

A small model is written in every format; each case breaks one of them in one way and reads it to the last tensor. A
case may end in success (a flipped bit of a weight is still a weight) or in a UserError of one sentence. Everything else
(another exception, a case that takes longer than ``--seconds``, a file that a pickle managed to create) is a failure,
and the broken checkpoint is kept under ``--keep``.
"""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bert.convert.conversion import convert
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.state import CanonicalState, SourceFacts, StateTensor, pretraining_tensors
from megatron_bert.ending import command
from megatron_bert.model.configuration import MegatronBertConfig
from parallel.errors import UserError

Mutation = Callable[[Path, random.Random], str]


# ---------------------------------------------------------------- corpus


def make_corpus(folder: Path) -> list[Path]:
    """A tiny model in every format and container; the folder must be empty."""
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=6,
        layer_norm_eps=1e-5,
    )
    state = CanonicalState(
        config=config,
        facts=SourceFacts(format="native", variant="made", files=0, stored_rows=config.vocab_size),
        tensors={n: StateTensor.held(torch.randn(shape), n) for n, shape in pretraining_tensors(config).items()},
    )
    return [_write(state, folder / name, to, options) for name, to, options in _CORPUS] + _rewritten(folder)


_CORPUS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("native", "native", {}),
    ("huggingface", "huggingface", {}),
    ("huggingface_sharded", "huggingface", {"max_shard_bytes": 3000}),
    ("megatron", "megatron", {"tensor": 2, "pipeline": 2}),
    ("megatron_v0", "megatron", {"checkpoint_version": 0.0}),
    ("core", "megatron-core", {"norms": "fused", "tensor": 2}),
)


def _write(state: CanonicalState, target: Path, to: str, options: dict[str, Any]) -> Path:
    from megatron_bert.convert.formats import FORMATS

    target.mkdir(parents=True)
    FORMATS[to].write(state, target, WriteOptions(**options))
    return target


def _rewritten(folder: Path) -> list[Path]:
    """The same again in containers that the converter reads but does not write."""
    shard = folder / "megatron_v0/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(shard, weights_only=False)
    stream = folder / "stream.pt"
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    archive = folder / "archive.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(stream, "release/mp_rank_00/model_optim_rng.pt")
    plain = folder / "huggingface_bin"
    plain.mkdir()
    shutil.copy(folder / "huggingface/config.json", plain)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "huggingface/model.safetensors"), plain / "pytorch_model.bin")
    return [stream, archive, plain]


# ---------------------------------------------------------------- mutations


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def _change_bytes(place: Path, chance: random.Random) -> str:
    path = chance.choice(_files(place))
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing"
    kind = chance.choice(("flip", "truncate", "zero", "delete", "insert", "copy", "extend"))
    # Most structure lies at the ends of a file.
    edge = min(len(data), 3000)
    at = chance.choice((chance.randrange(edge), len(data) - 1 - chance.randrange(edge), chance.randrange(len(data))))
    length = chance.choice((1, 2, 4, 8, 64, 1000))
    if kind == "flip":
        for _ in range(chance.choice((1, 1, 3, 20))):
            data[chance.randrange(max(0, at - 50), min(len(data), at + 50))] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del data[at:]
    elif kind == "zero":
        data[at : at + length] = bytes(min(length, len(data) - at))
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "insert":
        data[at:at] = chance.randbytes(length)
    elif kind == "copy":
        other = chance.randrange(len(data))
        data[at : at + length] = data[other : other + length]
    else:
        data += chance.randbytes(length)
    path.write_bytes(data)
    return f"{kind} at {at} of {path.name}"


def _change_files(place: Path, chance: random.Random) -> str:
    files = _files(place)
    path = chance.choice(files)
    kind = chance.choice(("remove", "empty", "swap", "text"))
    if kind == "remove" and len(files) > 1:
        path.unlink()
    elif kind == "swap":
        path.write_bytes(chance.choice(files).read_bytes())
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    else:
        path.write_bytes(b"")
    return f"{kind} {path.name}"


_ODD: tuple[Any, ...] = (None, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", [], {}, [[]], True)


def _change_json(place: Path, chance: random.Random) -> str:
    files = [path for path in _files(place) if path.suffix == ".json"]
    if not files:
        return _change_bytes(place, chance)
    path = chance.choice(files)
    content = json.loads(path.read_text())
    where: Any = content
    while True:
        key = chance.choice(list(where) if isinstance(where, dict) else range(len(where)))
        if not isinstance(where[key], (dict, list)) or not where[key] or chance.random() < 0.3:
            break
        where = where[key]
    if chance.random() < 0.2 and isinstance(where, dict):
        del where[key]
    else:
        where[key] = chance.choice(_ODD)
    path.write_text(json.dumps(content))
    return f"{key} in {path.name}"


def _change_structure(place: Path, chance: random.Random) -> str:
    """Change what a file of torch.save holds, and save it again."""
    files = [path for path in _files(place) if path.suffix in (".pt", ".bin")]
    if not files:
        return _change_json(place, chance)
    path = chance.choice(files)
    content = torch.load(path, weights_only=False)
    where: Any = content
    while True:
        held = where if isinstance(where, dict) else vars(where)
        key = chance.choice(list(held))
        if not isinstance(held[key], (dict, argparse.Namespace)) or not held[key] or chance.random() < 0.1:
            break
        where = held[key]
    kind = chance.choice(("drop", "odd", "shape", "rename", "dtype"))
    value = held[key]
    if kind == "drop":
        del held[key]
    elif kind == "rename":
        held[str(key) + chance.choice(("x", ".weight", ""))] = held.pop(key)
    elif kind == "shape" and isinstance(value, torch.Tensor) and value.numel():
        held[key] = chance.choice((value[:-1], value.flatten(), value[None], value.repeat(2, *[1] * (value.dim() - 1))))
    elif kind == "dtype" and isinstance(value, torch.Tensor):
        held[key] = value.to(chance.choice((torch.int64, torch.float16, torch.bool, torch.complex64)))
    else:
        held[key] = chance.choice((*_ODD, torch.zeros(2), torch.float16, (1, 2), {1: 2}, b"x"))
    torch.save(content, path, _use_new_zipfile_serialization=chance.random() < 0.7)
    return f"{kind} {key} in {path.name}"


class _Payload:
    """An object whose pickle would call a function when loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def payloads(canary: Path) -> list[bytes]:
    """Pickles that would create ``canary``, or exhaust memory or time, if they were loaded carelessly."""
    import os
    import subprocess

    write = f"open({str(canary)!r}, 'w').close()"
    touch = f"touch {canary}"
    objects = [
        _Payload(os.system, touch),
        _Payload(exec, write),
        _Payload(eval, write),
        _Payload(subprocess.check_call, ["touch", str(canary)]),
        _Payload(subprocess.Popen, ["touch", str(canary)]),
        _Payload(getattr, "text", "upper"),
        _Payload(open, str(canary), "w"),
        _Payload(__import__, "os"),
        _Payload(Path.touch, canary),
        _Payload(torch.load, str(canary)),
        _Payload(shutil.rmtree, str(canary.parent)),
        {"model": _Payload(os.system, touch)},
        {"args": argparse.Namespace(x=_Payload(os.system, touch))},
    ]
    raw = [pickle.dumps(value, protocol) for value in objects for protocol in (0, 2, 4)]
    shell = touch.encode()
    raw += [
        b"cposix\nsystem\n(S'" + shell + b"'\ntR.",
        b"(S'" + shell + b"'\niposix\nsystem\n.",  # INST
        b"(cposix\nsystem\nS'" + shell + b"'\no.",  # OBJ
        b"\x80\x02cbuiltins\ngetattr\ncos\nO\x86R.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(shell)]) + shell + b"\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\ncposix\nsystem\n\x85R.",
        b"\x80\x02cmegatron.a\nos.system\n)R.",  # an inert stand-in, with nothing in it
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of four thousand million entries
        b"\x80\x02X\xff\xff\xff\x7f.",  # a text of two thousand million characters
        b"\x80\x04\x96" + b"\xff" * 7 + b"\x7f.",  # a bytearray of all memory
        b"\x80\x02" + b"(" * 200_000 + b".",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\x02)" + b"2\x86" * 200 + b"}h\x00.",
        b"\x80\x02}q\x00)" + b"2\x86" * 60 + b"K\x01s.",  # a key that would take 2 to the 60 steps to hash
        b"\x80\x02}" + b"2}U\x01a3s" + b"2}U\x01b3s" + b".",
        b"\x80\x02ccollections\nOrderedDict\n)R(K\x01K\x02u}b.",
        b"\x80\x02cargparse\nNamespace\n)\x81}U\x09__class__K\x01sb.",
        b"\x80\x02cargparse\nNamespace\n}U\x08__init__K\x01sb.",
        b"\x82\x01.",  # EXT1
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"Pnothing\n.",  # PERSID
        b".",
        b"",
    ]
    return raw


def inject(place: Path, chance: random.Random, canary: Path) -> str:
    """Replace the pickle inside a file by a hostile one."""
    payload = chance.choice(payloads(canary))
    files = [path for path in _files(place) if path.suffix in (".pt", ".bin", "") or path.name == ".metadata"]
    path = chance.choice(files or _files(place))
    data = path.read_bytes()
    if path.name == ".metadata":
        path.write_bytes(payload)
    elif path.suffix == ".zip" or data[:2] != b"PK":
        # Behind the three short pickles that begin a stream of torch.
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        content = head + payload + pickle.dumps([], 2)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("release/mp_rank_00/model_optim_rng.pt", content)
        else:
            path.write_bytes(content)
    else:
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, payload if name.endswith("data.pkl") else content)
    return f"pickle {payload[:40]!r} in {path.name}"


# ---------------------------------------------------------------- running


class _TooSlowError(BaseException):
    pass


def _alarm(*_: Any) -> None:
    raise _TooSlowError


def read_to_the_end(place: Path, scratch: Path | None = None) -> None:
    """Open a checkpoint and read every tensor; convert it too, where a folder for the result is given."""
    if scratch is not None:
        convert(place, scratch / "result", to="native", progress=False)
        return
    with open_checkpoint(place) as state:
        for tensor in (*state.values(), *state.optimizer.values()):
            tensor.load()


def run_case(original: Path, folder: Path, seed: int, seconds: int = 20) -> tuple[str, str]:
    """Break a copy of a checkpoint and read it.

    Args:
        original: of the corpus.
        folder: an empty one for this case.
        seed: decides what is broken.
        seconds: after which the case is too slow.

    Returns:
        The outcome (``fine``, ``refused`` or a failure) and what was done to the files.
    """
    chance = random.Random(seed)
    place, canary = folder / original.name, folder / "canary"
    (shutil.copytree if original.is_dir() else shutil.copy)(original, place)
    what = inject(place, chance, canary) if chance.random() < 0.25 else break_files(place, chance)
    scratch = folder if chance.random() < 0.1 else None
    outcome = case_outcome(lambda: read_to_the_end(place, scratch), canary, seconds)
    if outcome != "fine" and (folder / "result").exists():
        outcome = f"a failed conversion left its result ({outcome})"
    return outcome, what


def break_files(place: Path, chance: random.Random) -> str:
    """Change bytes, files, JSON or the content of a file of torch.save; returns what was done."""
    mutations: list[Mutation] = [_change_bytes, _change_files, _change_json, _change_structure]
    return chance.choice(mutations)(place, chance)


def case_outcome(work: Callable[[], None], canary: Path, seconds: int) -> str:
    """``fine``, ``refused`` in one sentence, or a failure in words.

    Args:
        work: what may refuse the files of a case.
        canary: a file that is there only if they were run.
        seconds: after which the case is too slow.
    """
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(seconds)
    try:
        work()
        outcome = "fine"
    except UserError as error:
        text = str(error)
        outcome = "refused" if text and "\n" not in text and len(text) < 1000 else f"unclear message: {text[:200]}"
    except _TooSlowError:
        outcome = "too slow"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "code was run" if canary.exists() else outcome


@command("fuzz_checkpoints")
def main(arguments: list[str] | None = None) -> int:
    """Run many cases; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Fuzz the checkpoint readers with broken and hostile files.")
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--seconds", type=int, default=20, metavar="S", help="longest time of a case")
    parser.add_argument("--memory", type=float, default=8.0, metavar="GB", help="limit of address space; 0 sets none")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where failing checkpoints are kept")
    parsed = parser.parse_args(arguments)
    if parsed.memory:
        limit = int(parsed.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        corpus = make_corpus(Path(temporary, "corpus"))
        for number in range(parsed.seed, parsed.seed + parsed.cases):
            folder = Path(temporary, f"case{number}")
            folder.mkdir()
            original = corpus[number % len(corpus)]
            outcome, what = run_case(original, folder, number, parsed.seconds)
            outcomes[outcome if outcome in ("fine", "refused") else "failed"] += 1
            if outcome not in ("fine", "refused"):
                print(f"case {number} ({original.name}, {what}): {outcome}")
                if parsed.keep is not None:
                    shutil.copytree(folder, parsed.keep / f"case{number}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
