# SPDX-License-Identifier: Apache-2.0
"""The C++ engine on ARM: compiled by a cross compiler and run by an emulator, with the bits of the reference."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.ibert.engine import native_library
from megatron_bert.ibert.engine.plan_file import write_plan
from megatron_bert.ibert.engine.reference import ReferenceBackend
from tests.megatron_bert.ibert.engine_plans import random_plan, sequences
from tests.megatron_bert.ibert.test_cpu_backend import GOLDEN, HEADS, SETTINGS

#: Prefix of the names of the cross compiler's programs, and where its libraries are.
PREFIX, ROOT = "aarch64-linux-gnu-", "/usr/aarch64-linux-gnu"
#: The best instruction set of each of these processors.
PROCESSORS = {"cortex-a53": "neon", "neoverse-n1": "neon_dot", "max": "neon_i8mm"}
pytestmark = pytest.mark.slow  # compiles the library once more, when it has changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The library for ARM, and a program that answers with it."""
    missing = [each for each in (f"{PREFIX}g++", f"{PREFIX}gcc", f"{PREFIX}objdump") if shutil.which(each) is None]
    if missing:
        pytest.skip(f"there is no {missing[0]}: Debian's package g++-aarch64-linux-gnu has it")
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", f"{PREFIX}g++")
        library = shutil.copy(native_library.library(machine="aarch64"), folder)
    source = Path(__file__).with_name("answers.c")
    flags = ("-Wall", "-Werror", f"-I{native_library.SOURCES}", f"-Wl,-rpath,{folder}")
    subprocess.run([f"{PREFIX}gcc", *flags, source, library, "-o", folder / "answers"], check=True)
    return folder


def answers(folder: Path, processor: str, target: str, plan, inputs, threads: int = 2) -> tuple[str, np.ndarray]:
    """The instruction set that ran, and all numbers that the program writes."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("there is no qemu-aarch64: Debian's package qemu-user has it")
    write_plan(plan, folder / "plan.safetensors")
    tokens, positions, types, starts = (each.numpy().astype(np.int32) for each in inputs)
    given = np.concatenate(([len(starts) - 1], starts, tokens, positions, types)).astype(np.int32)
    command = [emulator, "-cpu", processor, "-L", ROOT, folder / "answers", folder / "plan.safetensors", str(threads)]
    own = os.environ | {"MEGATRON_BERT_CPU_TARGET": target}
    done = subprocess.run(command, input=given.tobytes(), capture_output=True, env=own)
    return done.stderr.decode().strip(), np.frombuffer(done.stdout, np.int32)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_all_instruction_sets_give_the_bits_of_the_reference(folder, processor):
    for settings in SETTINGS:
        plan, inputs = random_plan(**settings), sequences([1, 7, settings.get("positions", 64), 33, 2, 64])
        reference = ReferenceBackend().prepare(plan)
        hidden = reference.encode(*inputs)
        results = [hidden, *(reference.head(name, hidden) for name in HEADS)]
        no_flag_of_floating_point = [0]
        expected = np.concatenate([*(each.int().flatten().numpy() for each in results), no_flag_of_floating_point])
        target, found = answers(folder, processor, PROCESSORS[processor], plan, inputs)
        assert target == PROCESSORS[processor]
        assert np.array_equal(found, expected), settings


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_best_instruction_set_is_found_and_gives_the_golden_hash(folder, processor):
    plan, inputs = random_plan(seed=7), sequences([64, 1, 30])
    target, found = answers(folder, processor, "", plan, inputs, threads=1)
    assert target == PROCESSORS[processor]
    logits = found[-1 - 95 * len(plan.embeddings.word) : -1]
    assert hashlib.sha256(logits.tobytes()).hexdigest() == GOLDEN


def test_an_instruction_set_that_is_not_there_is_refused(folder):
    said, _ = answers(folder, "cortex-a53", "neon_dot", random_plan(layers=1), sequences([2]))
    assert said.endswith("MEGATRON_BERT_CPU_TARGET is 'neon_dot', but this processor runs neon, plain")


def test_the_library_has_no_instruction_of_floating_point_arithmetic(folder):
    """Moves between registers have a floating name, and compute nothing."""
    command = [f"{PREFIX}objdump", "-d", "--no-show-raw-insn", folder / native_library.LIBRARY]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = set(re.findall(r"^\s+[0-9a-f]+:\t([a-z0-9.]+)", listing, re.MULTILINE))
    assert {name for name in used if re.match(r"f(?!mov$)|bf|[su]cvtf|fjcvt", name)} <= {"bfi", "bfxil", "bfc"}
    assert used >= {"sqrdmulh", "sadalp", "sdot", "smmla"}
