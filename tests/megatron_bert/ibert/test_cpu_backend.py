# SPDX-License-Identifier: Apache-2.0
"""The C++ engine: the bits of the reference with every instruction set, in integers only, and safe with any file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.ibert.engine import native_library
from megatron_bert.ibert.engine.backends import backend_by_name
from megatron_bert.ibert.engine.cpu import CpuBackend, CpuExecutable
from megatron_bert.ibert.engine.native_engine import NativeEngine, native
from megatron_bert.ibert.engine.plan_file import plan_bytes, write_plan
from megatron_bert.ibert.engine.reference import ReferenceBackend
from parallel.errors import UserError
from tests.megatron_bert.ibert.engine_plans import BAD_INPUTS, random_plan, sequences

TARGETS = ("plain", "avx2", "avxvnni", "avx512", "amx")
GOLDEN = "8f08d23db6493e4c11e8cdb79b93f1eb2848f25fcd3aceb60ec52cd91c7b01c0"
HEADS = ("pooler", "classifier", "pair", "masked")
#: Of plans that every instruction set is tried on.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"post": True},
    {"hidden": 48, "heads": 2, "intermediate": 80, "layers": 3},
    {"hidden": 40, "heads": 5, "intermediate": 100, "post": True},
    {"bits": 7, "attention_limit": 63},
    {"bits": 7, "post": True},
    {"hidden": 128, "heads": 1, "layers": 1, "positions": 200},
    {"left": True, "seed": 3},
    {"loud": True},
    {"loud": True, "bits": 7, "hidden": 48, "heads": 2},
]


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """Every instruction set that this processor has."""
    monkeypatch.setenv("MEGATRON_BERT_CPU_TARGET", request.param)
    try:
        CpuExecutable(plan_bytes(random_plan(layers=1)), 1)
    except UserError as error:
        if "but this processor runs" not in str(error):
            raise
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_all_instruction_sets_give_the_bits_of_the_reference(target, settings):
    plan = random_plan(**settings)
    inputs = sequences([1, 7, settings.get("positions", 64), 33, 2, 64])
    reference = ReferenceBackend().prepare(plan)
    expected = reference.encode(*inputs)
    assert expected.float().std() > 1000  # nothing has died out or saturated all over
    rows = expected[inputs[3][:-1].long()]
    for threads in (1, 2):
        engine = CpuBackend().prepare(plan, threads)
        assert engine.target == target
        assert torch.equal(engine.encode(*inputs), expected)
        for head in HEADS:
            assert torch.equal(engine.head(head, rows), reference.head(head, rows)), head


def test_a_sequence_has_the_same_bits_in_any_batch_and_after_any_other(target):
    lengths = [20, 1, 64, 5]
    tokens, positions, types, starts = sequences(lengths)
    engine = CpuBackend().prepare(random_plan(), 2)
    together = engine.encode(tokens, positions, types, starts)
    for number, length in enumerate(lengths):
        own = slice(int(starts[number]), int(starts[number + 1]))
        alone = engine.encode(tokens[own], positions[own], types[own], torch.tensor([0, length]))
        assert torch.equal(alone, together[own])


def test_golden_hash_of_logits(target):
    """Of a fixed plan, on any machine, of any release: another hash is another arithmetic."""
    plan, inputs = random_plan(seed=7), sequences([64, 1, 30])
    for backend in (CpuBackend(), ReferenceBackend()):
        engine = backend.prepare(plan)
        logits = engine.head("masked", engine.encode(*inputs))
        assert hashlib.sha256(logits.numpy().tobytes()).hexdigest() == GOLDEN


def test_no_floating_point_flag_is_raised(target):
    library = native()
    engine = CpuBackend().prepare(random_plan(post=True), 1)
    inputs = sequences([64, 3])
    library.integer_engine_float_flags(1)
    hidden = engine.encode(*inputs)
    for head in HEADS:
        engine.head(head, hidden)
    assert library.integer_engine_float_flags(1) == 0


def test_the_library_has_no_instruction_of_floating_point_arithmetic():
    """Of the whole library, all targets included; moves of vectors have floating names too, and compute nothing."""
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native_library.library()], capture_output=True, text=True, check=True
    ).stdout
    used = set(re.findall(r"^\s+[0-9a-f]+:\t(?:[a-z]+ )?([a-z0-9]+)", listing, re.MULTILINE))
    floating = re.compile(
        r"v?(add|sub|mul|div|sqrt|min|max|rcp|rsqrt|cvt|u?comi|cmp|round|dp|fn?m|scalef|range|hadd|blend)"
    )
    found = {name for name in used if re.search(r"(ps|pd|ss|sd|ph|sh|bf16)$", name) and floating.match(name)}
    found |= {name for name in used if re.match(r"f[a-z]+$", name)} | {name for name in used if "cvt" in name}
    integers = {"vpminsd", "vpmaxsd", "vpdpbusd", "tdpbusd"}
    assert found - integers == set()
    for name, flags in native_library.targets().items():
        known = subprocess.run([native_library.compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull])
        symbol = f"ibert{len(name)}{name.lower()}"
        assert symbol in listing or known.returncode, f"the library lacks {name}, whose flags the compiler knows"


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("MEGATRON_BERT_CPU_TARGET", "mmx")
    with pytest.raises(UserError, match=r"MEGATRON_BERT_CPU_TARGET is 'mmx', but this processor runs .*plain"):
        CpuBackend().prepare(random_plan(layers=1))


@pytest.mark.parametrize(("change", "sentence"), BAD_INPUTS)
def test_bad_input_is_refused_in_a_sentence(change, sentence):
    engine = CpuBackend().prepare(random_plan(layers=1))
    with pytest.raises(UserError, match=sentence):
        engine.encode(*change(sequences([8])))
    assert engine.encode(*sequences([8])).shape == (8, 64)
    with pytest.raises(UserError, match=r"rows have the shape \[2, 63\], but the plan's have 64 columns"):
        engine.head("pooler", torch.zeros(2, 63))


def test_an_empty_batch_has_an_empty_answer():
    engine = CpuBackend().prepare(random_plan(layers=1))
    nothing = torch.empty(0, dtype=torch.int32)
    assert engine.encode(nothing, nothing, nothing, torch.tensor([0])).shape == (0, 64)
    assert engine.head("classifier", torch.empty(0, 64, dtype=torch.int16)).shape == (0, 3)


def test_damaged_plans_are_refused_in_a_sentence():
    whole = plan_bytes(random_plan(layers=1))
    for size in (0, 7, 100, len(whole) - 1):
        with pytest.raises(UserError, match=r"the cpu backend cannot use the plan: .*(cut off|damaged)"):
            CpuExecutable(whole[:size], 1)
    newer = whole.replace(b'"version":"1"', b'"version":"9"')
    with pytest.raises(UserError, match="it has version 9, and this engine reads 1"):
        CpuExecutable(newer, 1)
    shift = whole.replace(rb"\"score_shift\": 3", rb"\"score_shift\": 9" + b"9")[: len(whole)]
    with pytest.raises(UserError, match="cannot use the plan"):
        CpuExecutable(shift, 1)


def test_a_file_whose_digest_is_another_is_refused(tmp_path):
    path, whole = tmp_path / "plan.safetensors", plan_bytes(random_plan(layers=1, post=True))
    path.write_bytes(whole)
    NativeEngine(path, 1)
    write_plan(random_plan(layers=1, intermediate=1000), tmp_path / "larger")  # a checksum of several stretches
    NativeEngine(tmp_path / "larger", 1)
    middle = len(whole) * 3 // 4
    for at in (middle, middle + 1, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"cannot use .*plan\.safetensors: it is damaged: its digest is another"):
            NativeEngine(path, 1)
    path.write_bytes(plan_bytes(random_plan(layers=1), digest=False))
    with pytest.raises(UserError, match="it is damaged: its header is cut"):
        NativeEngine(path, 1)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="it is cut off"):
        NativeEngine(path, 1)
    with pytest.raises(UserError, match=r"cannot (open|read) "):
        NativeEngine(tmp_path, 1)


def test_a_file_that_is_cut_after_it_was_loaded_is_an_error(tmp_path):
    path, plan, inputs = tmp_path / "plan.safetensors", random_plan(layers=1), sequences([40, 9])
    expected = ReferenceBackend().prepare(plan).encode(*inputs).numpy()
    arrays = [each.numpy() for each in inputs]
    for threads in (1, 2):
        write_plan(plan, path)
        engine = NativeEngine(path, threads)
        assert (engine.encode(*arrays) == expected).all()
        os.truncate(path, 100)
        with pytest.raises(UserError, match="cannot read the plan's table of words any more: load it again"):
            engine.encode(*arrays)


def test_without_a_compiler_the_reference_runs_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.cache_clear()
    native_library.library.cache_clear()
    said: list[str] = []
    try:
        assert backend_by_name("auto", said.append).name == "reference"
    finally:
        native_library.library.cache_clear()
    assert len(said) == 1
    assert "there is no C++ compiler for the cpu backend" in said[0]


def _compiler(folder: Path, body: str) -> Path:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_library_is_built_once_and_a_failure_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_BERT_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "log"
    version = '[ "$1" = --version ] && exit 0'
    body = f'echo "$@" >> {log}; {version}; while [ "$1" != -o ]; do shift; done; echo built > "$2"'
    monkeypatch.setenv("CXX", str(_compiler(tmp_path, body)))
    native_library.library.cache_clear()
    try:
        first = native_library.library()
        assert first.read_text() == "built\n"
        compilations = len(log.read_text().splitlines())
        native_library.library.cache_clear()
        assert native_library.library() == first
        assert len(log.read_text().splitlines()) == compilations + 1  # asked for its version
        assert [path.name for path in first.parent.parent.iterdir() if path.name.startswith("building")] == []
        native_library.library.cache_clear()
        _compiler(tmp_path, f'{version}; echo "a.cpp:1: error: nothing works" >&2; exit 1')
        monkeypatch.setenv("MEGATRON_BERT_CACHE", str(tmp_path / "other"))
        with pytest.raises(UserError, match=r"cannot build the cpu backend: a\.cpp:1: error: nothing works"):
            native_library.library()
    finally:
        native_library.library.cache_clear()


def _compiled_with_c(output: Path, *arguments: object) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run([compiler, *map(str, arguments), "-o", str(output)], check=True)


def test_the_c_example_gives_the_logits(tmp_path):
    plan, library = random_plan(), native_library.library()
    write_plan(plan, tmp_path / "plan.safetensors")
    example = tmp_path / "example"
    _compiled_with_c(
        example, "-Wall", "-Werror", native_library.SOURCES / "example.c", library, f"-Wl,-rpath,{library.parent}"
    )
    tokens = [5, 17, 99, 0, 3]
    done = subprocess.run([example, tmp_path / "plan.safetensors", *map(str, tokens)], capture_output=True, text=True)
    reference = ReferenceBackend().prepare(plan)
    ids = torch.tensor(tokens).int()
    hidden = reference.encode(ids, torch.arange(5).int(), ids * 0, torch.tensor([0, 5]))
    logits = reference.head("classifier", reference.head("pooler", hidden[:1]))[0]
    assert [int(line) for line in done.stdout.split()] == logits.tolist()
    missing = subprocess.run([example, tmp_path / "none", "1"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr == f"example: cannot open {tmp_path / 'none'}\n"
    for word in ("abc", "99999999999999", ""):
        wrong = subprocess.run([example, tmp_path / "plan.safetensors", word], capture_output=True, text=True)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr == "example: a token id is not a number of 32 bits\n"


@pytest.mark.slow
@pytest.mark.timeout(600)  # compilers that sanitize take their time
def test_sanitizers_find_nothing_in_whole_runs_and_a_thousand_mutated_plans(tmp_path):
    """The engine and every target, built with the address and undefined-behavior sanitizers."""
    library = native_library.library(("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Og", "-g1"))
    plans = []
    for number, settings in enumerate(({"layers": 1}, {"hidden": 40, "heads": 5, "post": True}, {"bits": 7})):
        plans.append(tmp_path / f"{number}.safetensors")
        write_plan(random_plan(**{"intermediate": 96, "positions": 40, **settings}), plans[-1])
    program = tmp_path / "mutations"
    source = Path(__file__).with_name("mutations.c")
    flags = ("-fsanitize=address,undefined", "-g", f"-I{native_library.SOURCES}", f"-Wl,-rpath,{library.parent}")
    _compiled_with_c(program, *flags, source, library)
    for target in TARGETS:
        own = {**os.environ, "MEGATRON_BERT_CPU_TARGET": target}
        done = subprocess.run([program, "70", *plans], capture_output=True, text=True, env=own)
        if "but this processor runs" in done.stdout:
            continue
        assert (done.returncode, done.stderr) == (0, ""), target
        report = json.loads(done.stdout)
        assert report["runs"] >= 3
        assert report["runs"] + report["refused"] == 3 * 71
        assert report["refused"] > 20
