# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile files, what becomes of reading them, and many such cases in a row: for the two fuzzers."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import random
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from parallel.errors import UserError

Mutation = Callable[[Path, random.Random], str]


def read_back(path: Path) -> Any:
    """The content of a file of torch.save that the fuzzers have written themselves."""
    return torch.load(path, weights_only=False)


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
    content = read_back(path)
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


def break_files(place: Path, chance: random.Random) -> str:
    """Change bytes, files, JSON or the content of a file of torch.save; returns what was done."""
    mutations: list[Mutation] = [_change_bytes, _change_files, _change_json, _change_structure]
    return chance.choice(mutations)(place, chance)


# ---------------------------------------------------------------- cases


class _TooSlowError(BaseException):
    pass


def _alarm(*_: Any) -> None:
    raise _TooSlowError


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


def fuzz_parser(description: str, memory: float, limit: str) -> argparse.ArgumentParser:
    """Options of a fuzzer, ``memory`` in GB by default, and what it limits."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--seconds", type=int, default=20, metavar="S", help="longest time of a case")
    parser.add_argument("--memory", type=float, default=memory, metavar="GB", help=limit)
    return parser


def run_cases(
    options: argparse.Namespace,
    make: Callable[[Path], list[Path]],
    case: Callable[[Path, Path, int, int], tuple[str, str]],
    keep: Path | None = None,
) -> collections.Counter[str]:
    """Run the cases of a fuzzer, and say which of them failed.

    Args:
        make: writes files to break, into an empty folder.
        case: takes one of them, an empty folder, the number of the case and the seconds it may take, and gives the
            outcome and what was done to the files.
        keep: where broken files of failed cases are kept.

    Returns:
        How many were ``fine``, ``refused`` and ``failed``.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        place = Path(temporary, "originals")
        place.mkdir()
        originals = make(place)
        for number in tqdm(range(options.seed, options.seed + options.cases), unit="case", disable=None):
            folder = Path(temporary, f"case{number}")
            folder.mkdir()
            original = originals[number % len(originals)]
            outcome, what = case(original, folder, number, options.seconds)
            outcomes[outcome if outcome in ("fine", "refused") else "failed"] += 1
            if outcome not in ("fine", "refused"):
                print(f"case {number} ({original.name}, {what}): {outcome}")
                if keep is not None:
                    shutil.copytree(folder, keep / f"case{number}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    return outcomes


def in_words(outcomes: collections.Counter[str]) -> str:
    """How many cases had which outcome."""
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
