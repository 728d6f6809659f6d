# SPDX-License-Identifier: Apache-2.0
"""Every command that reads weights, given files with code in their pickles: a refusal, and the code is not run."""

from __future__ import annotations

import argparse
import importlib.util
import io
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bert import MegatronBertForPreTraining
from megatron_bert.cli import build_parser, main
from megatron_bert.convert.run_models import RESULTS_FILE
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.training.pretrain import pretrain
from parallel.errors import UserError
from parallel.manifest import write_manifest
from tests.megatron_bert.finetuning.support import make_run
from tests.megatron_bert.finetuning.support import run_settings as finetune_settings
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.megatron_bert.training.layouts import make_data
from tests.megatron_bert.training.runs import run_settings, write_config
from tests.parallel.test_hostile_checkpoints import Touch

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def tool(name: str) -> Any:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- files with code in them


def payload(canary: Path) -> bytes:
    """The beginning of a pickle that makes a file, and leaves nothing on the stack."""
    return pickletools.optimize(pickle.dumps(Touch(canary), 2))[:-1] + b"0"


def archive(canary: Path) -> bytes:
    """A file of torch.save that holds an empty dictionary, behind code."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("archive/data.pkl", payload(canary) + pickle.dumps({}, 2))
        members.writestr("archive/data/0", bytes(1 << 16))  # as large as any block
        members.writestr("archive/version", "3\n")
    return file.getvalue()


def stream(canary: Path) -> bytes:
    """The same as torch wrote it before 1.6."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    return head + payload(canary) + pickle.dumps({}, 2) + pickle.dumps([], 2)


def in_metadata(folder: Path, canary: Path) -> None:
    for path in folder.rglob(".metadata"):
        path.write_bytes(payload(canary) + path.read_bytes())
        write_manifest(path.parent)  # who means harm makes the checksums fit


def in_blocks(folder: Path, canary: Path) -> None:
    content = archive(canary)
    for path in folder.rglob(".metadata"):
        metadata = pickle.loads(path.read_bytes())
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, offset=0, length=len(content))
            (path.parent / info.relative_path).write_bytes(content)
        path.write_bytes(pickle.dumps(metadata))
        write_manifest(path.parent)


def in_torch_files(folder: Path, canary: Path, content: Callable[[Path], bytes] = archive) -> None:
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin")]
    assert files
    for path in files:
        path.write_bytes(content(canary))


def in_streams(folder: Path, canary: Path) -> None:
    in_torch_files(folder, canary, stream)


def in_members(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("release/mp_rank_00/model_optim_rng.pt", archive(canary))


def in_place_of_safetensors(folder: Path, canary: Path) -> None:
    found = list(folder.rglob("model.safetensors"))
    assert found
    for path in found:
        path.unlink()
        path.with_name("pytorch_model.bin").write_bytes(archive(canary))


Poison = Callable[[Path, Path], None]
RUN: tuple[Poison, ...] = (in_metadata, in_blocks)
#: Checkpoint of the corpus -> how code gets into it.
SOURCES: dict[str, tuple[Poison, ...]] = {
    "native": RUN,
    "megatron": (in_torch_files, in_streams),
    "core": (in_torch_files,),
    "stream.pt": (in_torch_files, in_streams),
    "archive.zip": (in_members,),
    "huggingface_bin": (in_torch_files, in_streams),
    "huggingface": (in_place_of_safetensors,),
}


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every format (``corpus``), a pretraining run and a fine-tuning run, each with its data."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "pretraining").mkdir()
    make_data(folder / "pretraining")
    pretrain(run_settings(folder / "pretraining", folder / "pretraining/run", training__steps=3))
    finetune(make_run(folder / "finetuning", training__steps=1))
    quantize(quantize_settings(folder / "finetuning", training__steps=1))
    (folder / "corpus").mkdir()
    tool("fuzz_checkpoints").make_corpus(folder / "corpus")
    return folder


class Case:
    """A copy of what was made, to put code into and give to a command."""

    def __init__(self, made: Path, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        self.made = made

    def copy(self, name: str) -> Path:
        """A copy of something that was made."""
        source, target = self.made / name, self.folder / Path(name).name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target

    def poisoned(self, name: str, poison: Poison) -> Path:
        """A copy with code in it."""
        target = self.copy(name)
        poison(target, self.canary)
        return target


def _pretrain(case: Case, place: Path, **changes: Any) -> list[str]:
    settings = run_settings(case.made / "pretraining", place, training__steps=4, **changes)
    return ["pretrain", str(write_config(settings, case.folder / "settings.yaml"))]


def _finetune(case: Case, place: Path, **changes: Any) -> list[str]:
    (place / RESULTS_FILE).unlink(missing_ok=True)  # as of a run that was stopped
    changes = {"training__run_dir": place, "training__steps": 2} | changes
    (case.folder / "settings.yaml").write_text(finetune_settings(case.made / "finetuning", **changes).dump())
    return ["finetune", str(case.folder / "settings.yaml")]


def _quantize(case: Case, place: Path, **changes: Any) -> list[str]:
    settings = quantize_settings(case.made / "finetuning", training__run_dir=case.folder / "quantized", **changes)
    tree = settings.model_copy(update={"model": settings.model.model_copy(update={"from_": place})})
    (case.folder / "settings.yaml").write_text(tree.dump())
    return ["quantize", str(case.folder / "settings.yaml")]


def _go_on_quantizing(case: Case, place: Path, **changes: Any) -> list[str]:
    (place / RESULTS_FILE).unlink(missing_ok=True)  # as of a run that was stopped
    changes = {"training__run_dir": place, "training__steps": 2} | changes
    (case.folder / "settings.yaml").write_text(quantize_settings(case.made / "finetuning", **changes).dump())
    return ["quantize", str(case.folder / "settings.yaml")]


def _step(run: Path) -> Path:
    (step,) = (run / "checkpoints").iterdir()
    return step


def _from_step(run: Path) -> dict[str, str]:
    return {"checkpoint__resume": str(_step(run))}


Command = Callable[[Case, Path], list[str]]
PRETRAINED, FINETUNED, MODEL = "pretraining/run", "finetuning/run", "finetuning/run/model"
QUANTIZED = "finetuning/quantized"
#: Command -> ways to give it a place of each kind: what was made, how code gets into it, the arguments.
READING: dict[str, list[tuple[str, tuple[Poison, ...], Command]]] = {
    "pretrain": [
        (PRETRAINED, RUN, lambda case, place: _pretrain(case, place)),
        (
            PRETRAINED,
            RUN,
            lambda case, place: _pretrain(case, case.folder / "new", checkpoint__resume=str(_step(place))),
        ),
        *(
            (f"corpus/{name}", poisons[:1], lambda case, place: _pretrain(case, case.folder / "new", model__from=place))
            for name, poisons in SOURCES.items()
        ),
    ],
    "finetune": [
        (FINETUNED, RUN, lambda case, place: _finetune(case, place)),
        (
            FINETUNED,
            RUN,
            lambda case, place: _finetune(case, case.folder / "new", checkpoint__resume=str(_step(place))),
        ),
        *(
            (
                f"corpus/{name}",
                poisons[:1],
                lambda case, place: _finetune(
                    case,
                    case.folder / "new",
                    model={"from": place},
                    tokenizer={"path": case.made / "pretraining/vocab.txt"},
                ),
            )
            for name, poisons in SOURCES.items()
        ),
    ],
    "quantize": [
        (FINETUNED, (in_place_of_safetensors,), _quantize),
        (QUANTIZED, RUN, _go_on_quantizing),
        (
            QUANTIZED,
            RUN,
            lambda case, place: _go_on_quantizing(case, place, checkpoint__resume=str(_step(place))),
        ),
    ],
    "fill-mask": [
        (PRETRAINED, RUN, lambda _, place: ["fill-mask", str(place), "a [MASK]"]),
        (PRETRAINED, RUN, lambda _, place: ["fill-mask", str(_step(place)), "a [MASK]"]),
    ],
    "evaluate": [
        (
            MODEL,
            (in_place_of_safetensors,),
            lambda case, place: ["evaluate", str(place), f"data.test={case.made}/finetuning/valid.jsonl"],
        )
    ],
    "predict": [
        (
            MODEL,
            (in_place_of_safetensors,),
            lambda case, place: ["predict", str(place), "--input", f"{case.made}/finetuning/valid.jsonl"],
        )
    ],
    "plan": [
        (
            "corpus/huggingface_bin",
            (in_torch_files,),
            lambda case, place: [
                "plan",
                *_pretrain(case, case.folder / "new", model__from=place)[1:],
                *("--gpus", "2", "--gpu", "h100"),
            ],
        )
    ],
    "convert": [
        (
            name,
            poisons,
            lambda case, place: ["convert", str(place), str(case.folder / "result"), "--to", "native"],
        )
        for name, poisons in [(f"corpus/{name}", poisons) for name, poisons in SOURCES.items()] + [(PRETRAINED, RUN)]
    ],
    "inspect": [
        (name, tuple(poison for poison in poisons if poison is not in_blocks), lambda _, place: ["inspect", str(place)])
        for name, poisons in [(f"corpus/{name}", poisons) for name, poisons in SOURCES.items()] + [(PRETRAINED, RUN)]
    ],
}
#: Those that read no weights, or only through the documented classes, which are tested below.
OTHERS = {
    *("train-tokenizer", "preprocess", "merge", "schedule", "config-schema", "configs", "scripts"),
    *("submit", "failures", "doctor", "bench", "export"),
}
CASES = [
    pytest.param(what, poison, command, id=f"{name}-{what}-{poison.__name__}-{number}")
    for name, ways in READING.items()
    for number, (what, poisons, command) in enumerate(ways)
    for poison in poisons
]


def test_every_command_is_known_here() -> None:
    (commands,) = (
        action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    assert set(commands) == READING.keys() | OTHERS, "say what a new command reads, in READING or OTHERS"


def assert_refused(error: str, canary: Path) -> None:
    assert not canary.exists()
    assert "asks to load io.open" in error
    assert error.count("\n") <= 1
    assert "weights_only" not in error


@pytest.mark.parametrize(("what", "poison", "command"), CASES)
def test_code_is_not_run(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    poison: Poison,
    command: Command,
) -> None:
    case = Case(made, tmp_path)
    place = case.poisoned(what, poison)
    assert main(command(case, place)) == 2
    error = capsys.readouterr().err
    assert_refused(error[error.index("megatron-bert ") :], case.canary)


@pytest.mark.parametrize("poison", [in_torch_files, in_streams])
def test_code_is_not_run_by_the_classes_and_the_tools(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Poison
) -> None:
    case = Case(made, tmp_path)
    place = case.poisoned("corpus/huggingface_bin", poison)
    with pytest.raises(UserError) as caught:
        MegatronBertForPreTraining.from_pretrained(place)
    assert_refused(str(caught.value), case.canary)
    assert tool("grow_checkpoint").main([str(place), str(tmp_path / "grown"), "--layers", "0"]) == 2
    assert_refused(capsys.readouterr().err, case.canary)
    assert tool("convert_checkpoint").main([str(case.poisoned("corpus/stream.pt", poison))]) == 2
    assert_refused(capsys.readouterr().err, case.canary)
