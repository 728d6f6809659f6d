# SPDX-License-Identifier: Apache-2.0
"""The cuda backend without a GPU: in Triton's interpreter, and compiled for GPUs that are not there.

Whether functions are interpreted is settled when Triton is imported, so one test runs this file again in a process of
its own, where those marked ``runs`` give the bits of the reference. With a GPU they run on it too.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[cuda]'")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from benchmarks import inference_gpu
from megatron_bert.finetuning.inference import Engine
from megatron_bert.ibert import IntegerModel
from megatron_bert.ibert import gelu as integer_gelu
from megatron_bert.ibert import tanh as integer_tanh
from megatron_bert.ibert.engine import cuda, cuda_arithmetic, cuda_graphs, cuda_kernels, cuda_model
from megatron_bert.ibert.engine.backends import PREFERRED, backend_by_name
from megatron_bert.ibert.engine.reference import ReferenceBackend
from megatron_bert.ibert.fixed_point import rounding_shift, short
from megatron_bert.ibert.softmax import ScoreFactor, softmax_numerators
from parallel.errors import UserError
from tests.megatron_bert.ibert.engine_plans import BAD_INPUTS, WORDS, random_plan, sequences
from tests.megatron_bert.ibert.test_cpu_backend import HEADS
from tests.megatron_bert.ibert.test_integer_model import quantized

INTERPRETED = triton.knobs.runtime.interpret
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or Triton's interpreter"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.mark.skipif(INTERPRETED, reason="it is what runs this file in the interpreter")
@pytest.mark.timeout(600)
def test_the_interpreter_gives_the_bits_of_the_reference():
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:xdist", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15


# ---------------------------------------------------------------- bits


@pytest.fixture(autouse=True)
def _no_checks(monkeypatch) -> None:
    """The interpreter looks for overflows, which takes its time, but says nothing of them."""
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", options)


@runs
@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"positions": 80}, [1, 70]),  # several blocks of queries and keys
        ({"post": True, "layers": 2}, [1, 3]),
        ({"hidden": 40, "heads": 5, "intermediate": 100, "post": True, "bits": 7}, [9]),
        ({"bits": 7, "attention_limit": 63, "left": True, "seed": 3, "layers": 2}, [2, 5]),
        ({"hidden": 160, "heads": 1, "intermediate": 32}, [3]),  # a head in two parts
    ],
    ids=str,
)
def test_it_gives_the_bits_of_the_reference(settings, lengths):
    plan = random_plan(**{"layers": 1, "heads": 2, "intermediate": 96, **settings})
    inputs = sequences(lengths)
    reference, executable = ReferenceBackend().prepare(plan), backend_by_name("cuda").prepare(plan)
    expected = reference.encode(*inputs)
    assert torch.equal(executable.encode(*inputs).cpu(), expected)
    rows = expected[inputs[3][:-1].long()]
    for head in HEADS:
        found = executable.head(head, rows).cpu()
        assert found.dtype == (torch.int16 if head == "pooler" else torch.int32)
        assert torch.equal(found, reference.head(head, rows)), head


@runs
@pytest.mark.parametrize("weight", [127, -127])
def test_nothing_overflows_where_weights_and_activations_are_the_largest(weight, monkeypatch):
    """The interpreter stops at a sum or product that does not fit in its 32 bits."""
    if INTERPRETED:
        monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True))
    plan = random_plan(layers=1, heads=1, intermediate=64)
    layer = plan.layers[0]
    for matrix in (layer.query_key_value, layer.attention_output, layer.intermediate, layer.output):
        matrix.weight.fill_(weight)
        matrix.bias.fill_(2**27 if weight > 0 else -(2**27))
    for norm in (layer.attention_norm, layer.mlp_norm):
        norm.offset.fill_(2**30)
    inputs = sequences([8])
    expected = ReferenceBackend().prepare(plan).encode(*inputs)
    assert torch.equal(backend_by_name("cuda").prepare(plan).encode(*inputs).cpu(), expected)


@runs
def test_a_model_answers_as_with_the_reference(tmp_path):
    model, given, expected = quantized("MegatronBertForTokenClassification")
    IntegerModel.from_model(model, "reference").save(tmp_path / "plan.safetensors")
    mine = IntegerModel.from_pretrained(tmp_path / "plan.safetensors", "cuda")
    assert mine.backend == "cuda"
    assert mine.plan.embeddings.word.is_meta  # its values are held by the device alone
    logits, real = mine(**given).logits.cpu(), given["attention_mask"].bool()
    assert torch.equal(logits[real], expected.logits[real])
    assert not logits[~real].any()


@runs
def test_the_benchmark_measures_it(monkeypatch, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = [
        "--shape",
        "tiny",
        "--rows",
        "1x4",
        "--rounds",
        "1",
        "--seconds",
        "60",
        "--systems",
        "integer",
        "torch bf16",
    ]
    places = ["--models", str(tmp_path / "models"), "--output", str(report)]
    monkeypatch.setattr(sys, "argv", ["inference_gpu", *arguments, *places])
    inference_gpu.main()
    row = json.loads(report.read_text())["rows"]["tiny B1 S4"]
    assert set(row["times"]) == {"integer W8A8 cuda", "torch bf16"}
    assert row["times"]["integer W8A8 cuda"]["signal_to_noise_db"] > 20
    assert list(row["ratios"]["integer W8A8 cuda"]) == ["bf16"]
    monkeypatch.setattr(sys, "argv", ["inference_gpu", "--rows", "0x4"])
    assert inference_gpu.main() == 2
    assert "--rows has '0x4': give sequences x tokens of each" in capsys.readouterr().err


# ---------------------------------------------------------------- arithmetic


@triton.jit
def _apply(a, b, out, FUNCTION: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """A function of the arithmetic on vectors."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x, y = tl.load(a + at), tl.load(b + at)
    if FUNCTION == "gelu":
        r = cuda_arithmetic.gelu(x.to(tl.int32), FIRST).to(tl.int64)
    elif FUNCTION == "tanh":
        r = cuda_arithmetic.tanh(x.to(tl.int32)).to(tl.int64)
    elif FUNCTION == "numerators":
        r = cuda_arithmetic.numerators(x.to(tl.int32), FIRST, tl.full((), SECOND, tl.uint32)).to(tl.int64)
    elif FUNCTION == "narrowed":
        r = cuda_arithmetic.narrowed(x.to(tl.int32), y.to(tl.int32)).to(tl.int64)
    elif FUNCTION == "square_root":
        r = cuda_arithmetic.square_root(x)
    elif FUNCTION == "quotient":
        length = cuda_arithmetic.bit_length(x.to(tl.uint32))
        high = cuda_arithmetic.power(length - 1)
        r = cuda_arithmetic.quotient(high, high * 0, x.to(tl.uint32), FIRST).to(tl.int64)
    tl.store(out + at, r)


def _applied(function: str, a: torch.Tensor, b: torch.Tensor | None = None, *, first: int = 0, second: int = 0):
    device = torch.device("cpu" if INTERPRETED else "cuda")
    count = 2**14 if INTERPRETED else 512
    filled = torch.nn.functional.pad(a.long(), (0, -len(a) % count), value=1).to(device)
    other = filled if b is None else torch.nn.functional.pad(b.long(), (0, -len(b) % count)).to(device)
    out = torch.empty_like(filled)
    _apply[(len(filled) // count,)](filled, other, out, FUNCTION=function, COUNT=count, FIRST=first, SECOND=second)
    return out[: len(a)].cpu()


@runs
@pytest.mark.parametrize("exponent", [1, 9, 13])
def test_gelu_of_every_argument(exponent):
    x = torch.arange(-32768, 32768)
    assert torch.equal(_applied("gelu", x, first=exponent), integer_gelu.gelu(x, exponent))


@runs
def test_tanh_of_every_argument():
    t = torch.arange(-16384, 16385)
    assert torch.equal(_applied("tanh", t), integer_tanh.tanh(t))


@runs
@pytest.mark.parametrize(("multiplier", "shift"), [(65535, 0), (40000, -16), (32768, -2), (50001, 7), (65535, 31)])
def test_numerators(multiplier, shift):
    distance = torch.cat((torch.arange(70000), 2 ** torch.arange(17, 26)))
    expected = softmax_numerators(-distance, ScoreFactor(multiplier, shift), None)
    assert torch.equal(_applied("numerators", distance, first=shift, second=multiplier), expected)


@runs
def test_rounding_shifts():
    values = torch.tensor(
        [0, 1, -1, 2, 3, -3, 2**14, -(2**15), 2**15, 2**16 + 1, 2**29, -(2**29), 2**30 - 1, 1 - 2**30]
    )
    shifts = torch.arange(-15, 31)
    a, s = (each.flatten() for each in torch.meshgrid(values, shifts, indexing="ij"))
    assert torch.equal(_applied("narrowed", a, s), short(rounding_shift(a, s)))


@runs
def test_roots_and_quotients():
    generator = torch.Generator().manual_seed(0)
    roots = torch.cat(
        (torch.arange(1, 200), torch.randint(1, 2**31, (800,), generator=generator), torch.tensor([2**31 - 1]))
    )
    n = torch.cat(((roots**2), roots**2 - 1, roots**2 + 1, torch.tensor([0, 2**62 - 1])))
    assert _applied("square_root", n).tolist() == [math.isqrt(each) for each in n.tolist()]
    divisors = torch.cat((torch.arange(1, 2000), roots, 2 ** torch.arange(31)))
    for bits in (15, 16):
        expected = [2 ** (each.bit_length() - 1 + bits) // each for each in divisors.tolist()]
        assert _applied("quotient", divisors, first=bits).tolist() == expected


# ---------------------------------------------------------------- graphs


@runs
def test_replayed_batches_have_the_bits_of_others():
    """With a recorder that runs what it has recorded, as a graph does: from the same memory into the same."""
    plan, device = random_plan(layers=1, heads=1, intermediate=64), backend_by_name("cuda").device
    reference, model = ReferenceBackend().prepare(plan), cuda_model.CudaModel(plan, device)
    recorded = []

    def recorder(run):
        out = run()
        recorded.append(len(out))
        return lambda: out.copy_(run()), out

    replay = cuda_graphs.Replay(model.encode, device, recorder)
    results = []
    for seed, lengths in enumerate([[4, 8], [6, 5]]):
        inputs = sequences(lengths, seed)
        ids, blocks = torch.stack(inputs[:3]), cuda_model.query_blocks(inputs[3])
        results.append((replay(ids, blocks).cpu(), reference.encode(*inputs)))
    assert recorded == [12]  # the second batch is replayed
    assert all(torch.equal(found, expected) for found, expected in results)


def test_few_recordings_are_kept(monkeypatch):
    made = []

    def recorder(run):
        made.append(1)
        return (lambda: None), run()

    replay = cuda_graphs.Replay(lambda ids, blocks: ids.t(), torch.device("cpu"), recorder)
    for tokens in (1, 2):
        for blocks in range(1, 40):
            assert len(replay(torch.ones(3, tokens).int(), torch.zeros(blocks, 3).int())) == tokens
        assert len(made) == 17 * tokens  # 1 to 8, then in steps of 2, 4 and 8 to 40
    monkeypatch.setattr(cuda_graphs, "_MOST_RECORDINGS", 20)
    for tokens in (3, 1):
        replay(torch.ones(3, tokens).int(), torch.zeros(1, 3).int())
    assert len(made) == 36  # the oldest was given up


def test_blocks_of_queries_have_one_sequence():
    blocks = cuda_model.query_blocks(torch.tensor([0, 1, 1, 130, 194])).tolist()
    assert blocks == [[0, 0, 1], [1, 1, 130], [65, 1, 130], [129, 1, 130], [130, 130, 194]]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("post", [False, True])
def test_real_sizes_and_recordings_on_a_gpu(post):
    plan = random_plan(hidden=1024, intermediate=4096, heads=16, positions=512, post=post)
    reference, executable = ReferenceBackend().prepare(plan), backend_by_name("cuda").prepare(plan)
    for seed, lengths in enumerate([[512, 1, 300, 77, 512, 211], [128], [100, 28], [127, 1], [5]]):
        inputs = sequences(lengths, seed)
        assert torch.equal(executable.encode(*inputs).cpu(), reference.encode(*inputs))


# ---------------------------------------------------------------- refusals


@runs
@pytest.mark.parametrize(("change", "sentence"), BAD_INPUTS)
def test_bad_input_is_refused_in_a_sentence(change, sentence):
    executable = backend_by_name("cuda").prepare(random_plan(layers=1))
    with pytest.raises(UserError, match=sentence):
        executable.encode(*change(sequences([8])))
    with pytest.raises(UserError, match=r"rows have the shape \[2, 63\], but the plan's have 64 columns"):
        executable.head("pooler", torch.zeros(2, 63))


@runs
def test_an_empty_batch_has_an_empty_answer():
    executable = backend_by_name("cuda").prepare(random_plan(layers=1))
    nothing = torch.empty(0, dtype=torch.int32)
    assert executable.encode(nothing, nothing, nothing, torch.tensor([0])).shape == (0, 64)
    assert executable.head("classifier", torch.empty(0, 64, dtype=torch.int16)).shape == (0, 3)
    assert executable.head("masked", torch.empty(0, 64, dtype=torch.int16)).shape == (0, WORDS)


@runs
def test_it_takes_no_number_of_threads():
    with pytest.raises(UserError, match="threads is 2, but the cuda backend takes no number of threads: leave it out"):
        backend_by_name("cuda").prepare(random_plan(layers=1), 2)


def test_without_triton_or_a_gpu_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="the cuda backend needs an NVIDIA GPU, and torch finds none"):
        backend_by_name("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"the cuda backend needs compute capability 8\.0, and the GPU has 7\.5"):
        backend_by_name("cuda")
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the cuda backend needs Triton: pip install 'megatron-bert\[cuda\]'"):
        backend_by_name("cuda")


def test_auto_does_not_take_what_has_not_run_on_a_gpu(monkeypatch):
    """Where it does, commands and documents say so too."""
    assert "cuda" not in PREFERRED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Engine("integer").device("auto") == "cpu"
    assert Engine("cuda").device("auto") == Engine("cuda").device("cuda") == "cuda"
    for engine, device, sentence in (
        (
            "integer",
            "cuda",
            "--backend integer computes on the CPU: leave --device cuda out, or name .* by --backend cuda",
        ),
        ("cpu", "cuda", "--backend cpu computes on the CPU: leave --device cuda out"),
        ("cuda", "cpu", "--backend cuda computes on a GPU: leave --device cpu out"),
    ):
        with pytest.raises(UserError, match=sentence):
            Engine(engine).device(device)


# ---------------------------------------------------------------- compiled for GPUs


class _Launches:
    """Takes the place of a kernel: notes what it is launched with, and launches nothing."""

    def __init__(self, kernel: Any, found: dict[tuple, tuple]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]):
        return self._note

    def _note(self, *arguments: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
        signature, attributes = {}, {}
        names = self.kernel.arg_names
        for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
            tensor = isinstance(value, torch.Tensor)
            signature[name] = f"*i{8 * value.element_size()}" if tensor else "i32"
            assert not tensor or not (value.is_floating_point() or value.is_complex())
            if tensor or (name != "rows" and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(names[len(arguments) :], "constexpr")
        key = (self.kernel.__name__, *signature.values(), *attributes, *constants.values(), num_warps, num_stages)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.found[key] = (ASTSource(self.kernel, signature, constants, attributes), options)


def _launches(monkeypatch, tokens: int, **settings: Any) -> dict[tuple, tuple]:
    """All kernels of a plan, heads included, as they are launched for so many tokens."""
    found: dict[tuple, tuple] = {}
    with monkeypatch.context() as patch:
        for name in ("embed", "narrow", "normalize", "linear", "attend"):
            patch.setattr(cuda_kernels, name, _Launches(getattr(cuda_kernels, name), found))
        model = cuda_model.CudaModel(random_plan(layers=1, **settings), torch.device("cpu"))
        rows = model.encode(torch.zeros(3, tokens).int(), cuda_model.query_blocks(torch.tensor([0, tokens])))
        for head in HEADS:
            model.head(head, rows)
    return found


def _assert_integers_alone(source: ASTSource, options: dict[str, int], capability: int, folder: Path) -> None:
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    listing = compiled.asm["ptx"]
    assert not re.search(r"\.(f16|bf16|f32|f64|tf32|f16x2|bf16x2|e4m3|e5m2)\b", listing)
    products = set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\S*", listing))
    assert all(re.search(r"\.s32\.s8\.s8(\.s32)?$", each) for each in products)
    assert bool(products) == (source.fn.__name__ in ("linear", "attend"))
    # What the assembler makes of it: a division, for one, would be made of floating-point reciprocals there.
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    disassemble = [tools / "nvdisasm", "--print-code", "--no-dataflow", binary]  # which instructions is enough
    machine = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    used = set(re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)[. ]", machine, re.MULTILINE))
    assert len(used) > 10
    floating = (
        r"(F(ADD|MUL|FMA|SETP?|SEL|MNMX|CHK|SWZADD|RND)\d*|[HD](ADD|MUL|FMA|SETP?|MNMX|MMA)2?|MUFU|RRO|I2FP?|F2[IF]P?)"
    )
    assert {each for each in used if re.fullmatch(floating, each)} == set()
    used_memory = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    assert "STACK:0" in used_memory  # all is in registers
    assert compiled.metadata.shared <= (163 if capability == 80 else 227) * 1024


@compiles
def test_kernels_compile_for_a_gpu_to_integers_alone(monkeypatch, tmp_path):
    """Small ones, of each kind: all and of real sizes are slow."""
    found = _launches(monkeypatch, 100, hidden=128, post=True)
    for name in ("attend", "normalize", "linear"):
        chosen = next(each for key, each in found.items() if key[0] == name and "add" not in key)
        _assert_integers_alone(*chosen, 90, tmp_path)


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_of_real_sizes_compile_to_integers_alone(capability, monkeypatch, tmp_path):
    sizes = {"hidden": 1024, "intermediate": 4096, "heads": 16}
    found = _launches(monkeypatch, 16384, **sizes)
    others = {
        **_launches(monkeypatch, 128, **sizes, post=True),
        **_launches(monkeypatch, 10, hidden=160, heads=1, intermediate=64),
    }
    found |= {key: each for key, each in others.items() if key[0] in ("attend", "normalize") or "gelu" in key}
    assert len(found) > 15
    if capability < 90:  # of what differs there, the products, those with the most around them
        found = {key: each for key, each in found.items() if key[0] == "attend" or {"gelu", "add"} & set(key)}
        assert len(found) > 4
    for source, options in found.values():
        _assert_integers_alone(source, options, capability, tmp_path)
