# SPDX-License-Identifier: Apache-2.0
"""How commands end: real signals to real processes, closed pipes, full disks, and what is left of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_bert.ending import Ending, Terminated, command
from parallel.errors import UserError
from tests.megatron_bert.data.support import small_vocabulary

#: A command that prints and needs no torch.
SCHEDULE = ("schedule", "--pipeline", "8", "--microbatches", "8", "--schedule", "all")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _no_signal_is_ignored() -> Iterator[None]:
    """As at the start of a process; runs in this one, in other tests, leave some ignored when they end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*arguments: str | Path, **options: object) -> subprocess.Popen[str]:
    given = [sys.executable, "-m", "megatron_bert", *map(str, arguments)]
    return subprocess.Popen(given, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options)  # type: ignore[call-overload, no-any-return]


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Processes of a process group that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_unwinds_and_gives_its_code(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    cleaned = False
    with Ending("work") as ending:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # again, as impatient senders do
            cleaned = True
    assert cleaned
    assert ending.code == 128 + number
    assert capsys.readouterr().err == f"terminated by {number.name}\n"
    assert signal.getsignal(number) == before


def test_a_signal_that_is_lost_on_the_way_still_counts() -> None:
    class Swallows:
        def __del__(self) -> None:
            with suppress(SystemExit):
                signal.raise_signal(signal.SIGTERM)

    with Ending("work") as ending:
        Swallows()
        raise OSError("that the signal led to")
    assert ending.code == 143


def test_a_block_in_another_leaves_signals_to_it() -> None:
    with Ending("outer") as outer:
        with Ending("inner"):
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")
    assert outer.code == 143


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Ending("work") as ending:
            signal.raise_signal(signal.SIGHUP)
        assert ending.code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_alone() -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(command("work")(lambda: 7)()))
    thread.start()
    thread.join()
    assert codes == [7]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("give another"), 2, "work: give another\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            2,
            "work: cannot use /a/b (No space left on device): free some space, or give a place that has more\n",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", b"/a"),
            2,
            "work: cannot use /a (Read-only file system): give a place that can be written to\n",
        ),
        (OSError(errno.ESTALE, "Stale file handle", "f"), 1, "work: cannot use f (Stale file handle): mount the"),
        (
            OSError("without a number"),
            2,
            "work: cannot use the output or a file (without a number): give another place",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(signal.SIGTERM), 143, "terminated by SIGTERM\n"),
    ],
)
def test_errors_become_a_sentence(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ending("work") as ending:
        raise error
    assert ending.code == code
    assert capsys.readouterr().err.startswith(said)


def test_programming_errors_come_through() -> None:
    with pytest.raises(ZeroDivisionError), Ending("work"):
        1 / 0  # noqa: B018


def test_native_code_does_not_keep_a_process_alive() -> None:
    # Python's handlers cannot run while C code waits, as a rendezvous does.
    code = """if True:
        import ctypes
        import megatron_bert.ending as ending
        ending._PATIENCE = 0.2
        with ending.Ending("work") as work:
            libc = ctypes.CDLL(None)
            lock = (ctypes.c_ulonglong * 8)()
            libc.pthread_mutex_lock(lock)
            print("ready", flush=True)
            libc.pthread_mutex_lock(lock)
        raise SystemExit(work.code)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert process.stderr is not None
        assert process.stderr.read() == b"terminated by SIGTERM\n"


def test_a_signal_during_an_import_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "takes_everything.py").write_text(
        "import signal, time\ntry:\n    signal.raise_signal(signal.SIGINT)\n    time.sleep(0.2)\n"
        "except BaseException:\n    raise ImportError('no such library')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Ending("work") as ending:
        import takes_everything  # type: ignore[import-not-found]

        time.sleep(60)
        raise AssertionError(f"{takes_everything} has swallowed the signal")
    assert ending.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated by SIGTERM\n")]
)
def test_signals_count_from_the_first_import(tmp_path: Path, number: signal.Signals, said: str) -> None:
    (tmp_path / "argparse.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, *sys.path)))}
    given = [sys.executable, "-m", "megatron_bert", "predict", "run"]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, error = process.communicate()
    assert (process.returncode, error) == (128 + number, said)


def test_the_command_line_starts_without_heavy_imports() -> None:
    code = "import sys; from megatron_bert import cli; cli.build_parser(); print({'torch', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_training_starts_without_the_compiler_and_divided_tensors() -> None:
    code = """
import sys, torch
from megatron_bert.finetuning import finetune
from megatron_bert.quantizing import quantize
from megatron_bert.training import pretrain, update_rules
from megatron_bert.config_sections import OptimizerSettings
from parallel.checkpoint_plan import global_plans, local_plan
from parallel.runs import lone_run
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
run = lone_run(weight, update_rules.Kind(0.0, 1.0))
update_rules.AdamW([run], OptimizerSettings(), None, [weight], frozenset()).step(0.5, None, None)
(plan,) = global_plans([local_plan({"weight": weight})])
heavy = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy"}
print(weight[0].item() < 1 < len(plan.metadata), heavy & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True set()\n", done.stderr


@pytest.mark.parametrize("run", [False, True], ids=["other commands", "runs"])
def test_little_garbage_is_looked_for(run: bool) -> None:
    code = f"""
import atexit, gc
from megatron_bert import __main__, cli, starting
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # the first to be registered is the last to be called
usual = gc.get_threshold()
cli.main = starting.collect_as_usual if {run} else lambda: None
__main__.main()
print(gc.get_threshold() == usual, gc.get_freeze_count() > 1000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{run} {run}\nTrue\n", done.stderr


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    with start(*SCHEDULE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_full_output_is_said() -> None:
    with open("/dev/full", "w") as full, start(*SCHEDULE, stdout=full) as process:
        assert process.wait(60) == 2
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.startswith("megatron-bert schedule: cannot use the output or a file (No space left on device)")
    assert said.count("\n") == 1


@pytest.fixture
def preprocessing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of ``preprocess`` with two workers in the midst of its work, the leader of a process group."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The cat sat on the mat.\n\n" * 1_000_000, encoding="utf-8")
    process = start(
        *("preprocess", "--input", text, "--tokenizer", small_vocabulary(tmp_path)),
        *("--output-prefix", out / "corpus", "--workers", "2"),
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(path.stat().st_size for path in out.glob("*")))  # the workers are at work
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    wait_until(lambda: not members(process.pid), 20)


@pytest.mark.parametrize(("number", "everyone"), [(signal.SIGTERM, False), (signal.SIGHUP, True)])
def test_preprocess_ends_with_its_workers_and_files(
    preprocessing: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    if everyone:
        os.killpg(preprocessing.pid, number)
    else:
        preprocessing.send_signal(number)
    assert preprocessing.wait(60) == 128 + number
    assert preprocessing.stderr is not None
    said = preprocessing.stderr.read()
    assert "Traceback" not in said
    assert said.endswith(f"terminated by {number.name}\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_workers_of_preprocess_do_not_outlive_it(preprocessing: subprocess.Popen[str]) -> None:
    preprocessing.kill()  # the fixture waits for the rest
