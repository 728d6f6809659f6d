# SPDX-License-Identifier: Apache-2.0
"""Operators that a training step dispatches outside of compiled code: on a GPU a kernel each, or several.

They cost the host time that nothing hides. Counted for a whole step of the trainer on packed rows with dropout: without
compilation, with compiled layers, and with all that ``training.compile=all`` compiles. Operators inside of compiled
code, which a compiler fuses, are counted apart. Nothing is timed.

    python -m benchmarks.kernels --layers 24 --hidden 64
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import provenance, publish
from benchmarks.our_trainer import our_trainer, step_settings
from megatron_bert.ending import command
from megatron_bert.planning.dry_run import longest_batch
from parallel.process_group import World, process_group

VOCABULARY = 512
WAYS: dict[str, bool | str] = {"eager": False, "layers compiled": True, "all compiled": "all"}


class Outside(TorchDispatchMode):
    """Counts operators that are not views, by name: those of compiled code, which it sees run, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: Counter[str] = Counter()
        self.inside = self.compiled = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled while this counts."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            if self.compiled:
                self.inside += 1
            else:
                self.outside[str(function)] += 1
        return function(*args, **(kwargs or {}))

    def backend(self) -> Callable[..., Any]:
        """A compiler for torch.compile that runs graphs as they are, and says when."""

        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            def run(given: list[Any]) -> Any:
                self.compiled += 1
                try:
                    return graph(*given)
                finally:
                    self.compiled -= 1

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return cast(Callable[..., Any], aot_autograd(fw_compiler=compiler, bw_compiler=compiler))


def count(given: argparse.Namespace, compiled: bool | str, world: World) -> dict[str, Any]:
    """Operators of the third step, and graphs that it added to those of the first."""
    torch._dynamo.reset()
    counter = Outside()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": given.hidden, "num_hidden_layers": given.layers, "num_attention_heads": 4}
        how = {"packed": True, "compile": compiled, "device": "cpu"}
        settings = step_settings(Path(folder), sizes, given.length, 4, given.micro_batches, "bfloat16", **how)
        compiling = mock.patch("torch.compile", partial(torch.compile, backend=counter.backend()))
        with compiling, our_trainer(settings, VOCABULARY, world) as trainer:
            batches = [longest_batch(settings)] * given.micro_batches
            counters.clear()
            trainer.train_step(batches)
            graphs = counters["stats"]["unique_graphs"]
            trainer.train_step(batches)
            with counter:
                trainer.train_step(batches)
    return {
        "outside": counter.outside.total(),
        "inside": counter.inside,
        "graphs": graphs,
        "compiled_later": counters["stats"]["unique_graphs"] - graphs,
        "most_frequent": dict(counter.outside.most_common(8)),
    }


@command("benchmarks.kernels")
def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    sizes = {name: getattr(given, name) for name in ("layers", "hidden", "length", "micro_batches")}
    with process_group("cpu") as world:
        found = {name: count(given, compiled, world) for name, compiled in WAYS.items()}
    publish({**provenance("kernels", arguments=arguments), **sizes, "found": found}, given.output)


if __name__ == "__main__":
    raise SystemExit(main())
