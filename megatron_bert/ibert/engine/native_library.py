# SPDX-License-Identifier: Apache-2.0
"""The C++ engine as a shared library: part of a wheel, or built once by the system's compiler into the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from parallel.errors import UserError

SOURCES = Path(__file__).parent / "native"
LIBRARY = "libinteger_engine.so"
#: Where a wheel has the library it was built with.
BUILT_WITH_WHEEL = SOURCES / "built"
_STAMP = "sources.sha256"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-function")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_ARM = "-march=armv8.2-a+dotprod"
#: Instruction sets by the suffix of their macro, with the compiler's flags; those it does not know are left out.
_X86: dict[str, tuple[str, ...]] = {
    "AVX2": ("-mavx2",),
    "AVXVNNI": ("-mavx2", "-mavxvnni"),
    "AVX512": _AVX512,
    "AMX": (*_AVX512, "-mamx-tile", "-mamx-int8"),
}
_AARCH64: dict[str, tuple[str, ...]] = {"NEON": (), "NEON_DOT": (_ARM,), "NEON_I8MM": (f"{_ARM}+i8mm",)}
_OF_MACHINES = {"x86_64": _X86, "AMD64": _X86, "aarch64": _AARCH64, "arm64": _AARCH64}


def targets(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """Instruction sets for a kind of processor (this one by default), with the compiler's flags."""
    return {"PLAIN": (), **_OF_MACHINES.get(machine or platform.machine(), {})}


def compiler() -> str:
    """The C++ compiler: that of ``CXX``, else the system's.

    Raises:
        UserError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise UserError("there is no C++ compiler for the cpu backend: install g++ or clang++, or name one in CXX")


def sources_hash() -> str:
    """Of the sources, to recognize a library that was built from them."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(folder: Path, extra: tuple[str, ...] = (), machine: str | None = None) -> Path:
    """Compile the library.

    Args:
        folder: that exists; gets the library and its objects.
        extra: flags of the compiler, such as those of sanitizers.
        machine: the kind of processor that the compiler compiles for; this one by default.

    Returns:
        The library.

    Raises:
        UserError: the compiler fails.
    """
    cxx = compiler()
    wanted = targets(machine)

    def compiled(name: str, source: str, flags: tuple[str, ...]) -> Path:
        path = folder / f"{name}.o"
        _run([cxx, *_FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", str(path)])
        return path

    def target(name: str) -> Path | None:
        try:
            return compiled(name, "target.cpp", (f"-DTARGET_{name}", f"-DTARGET={name.lower()}", *wanted[name]))
        except UserError:
            if name == "PLAIN":
                raise
            return None  # an older compiler

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = dict(zip(wanted, pool.map(target, wanted)))
    known = {name: path for name, path in objects.items() if path is not None}
    best_first = "".join(f"X({name.lower()})" for name in reversed(known))
    engine = compiled("engine", "engine.cpp", ("-pthread", f"-DTARGETS={best_first}"))
    library = folder / LIBRARY
    _run([cxx, "-shared", "-pthread", *extra, str(engine), *map(str, known.values()), "-o", str(library)])
    return library


def build_for_wheel(folder: Path) -> None:
    """Compile the library into the package of a wheel, with a note of what it was built from.

    Args:
        folder: in the wheel; is made.
    """
    with tempfile.TemporaryDirectory() as building:
        built = build(Path(building))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, folder / LIBRARY)
    (folder / _STAMP).write_text(f"{sources_hash()}\n", encoding="utf-8")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"cannot run the C++ compiler {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise UserError(f"the C++ compiler {command[0]} cannot build the cpu backend: {lines[0].strip()}")


def cache_folder() -> Path:
    """Where libraries are built: ``MEGATRON_BERT_CACHE``, else ``megatron-bert`` in the user's cache folder."""
    own = os.environ.get("MEGATRON_BERT_CACHE")
    if own:
        return Path(own) / "engine"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-bert" / "engine"


@cache
def library(extra: tuple[str, ...] = (), machine: str | None = None) -> Path:
    """The library: the wheel's, or built at the first call of all processes of this user.

    Args:
        extra: flags of the compiler beyond those of a wheel's library.
        machine: the kind of processor that the compiler compiles for; this one by default.

    Raises:
        UserError: it is not there, and cannot be built.
    """
    stamp = BUILT_WITH_WHEEL / _STAMP
    sources = sources_hash()
    own = not extra and machine is None
    if own and stamp.is_file() and stamp.read_text().strip() == sources and (BUILT_WITH_WHEEL / LIBRARY).is_file():
        return BUILT_WITH_WHEEL / LIBRARY
    cxx = compiler()
    try:
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError as error:
        raise UserError(f"cannot run the C++ compiler {cxx}: {error.strerror}") from None
    key = repr((sources, cxx, version, _FLAGS, extra, targets(machine), machine or platform.machine()))
    folder = cache_folder()
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:24] / LIBRARY
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not path.is_file():
                print(f"building the cpu backend with {cxx}, once", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
                    built = build(Path(building), extra, machine)
                    path.parent.mkdir(exist_ok=True)
                    os.replace(built, path)
    except OSError as error:
        raise UserError(
            f"cannot build the cpu backend in {folder}: {error.strerror}; set MEGATRON_BERT_CACHE"
        ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(library())
