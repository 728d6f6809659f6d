# SPDX-License-Identifier: Apache-2.0
"""What there are tables of grows by a file and a line of the table, in a package of a user too."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bert import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.cli import main
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.formats import FORMATS
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from megatron_bert.finetuning.batches import collate_instances
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.inference import evaluate_files
from megatron_bert.finetuning.integer import IntegerTask
from megatron_bert.finetuning.saved import load_task
from megatron_bert.ibert import QuantizationConfig, calibrate, quantize_model, quantizers
from megatron_bert.ibert.activations import INTEGER_ACTIVATIONS
from megatron_bert.ibert.engine.model import IntegerModel
from megatron_bert.model.activations import ACTIVATIONS
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.model.task_heads.table import HEADS
from megatron_bert.quantizing.quantize import quantize
from megatron_bert.tables import DECAYS, OPTIMIZERS
from megatron_bert.tasks.table import TASKS
from megatron_bert.tasks.task import Head
from parallel.errors import UserError
from parallel.pipeline.schedules import SCHEDULES, build_schedule
from parallel.pipeline.simulate import simulate
from parallel.pipeline.validate import validate
from parallel.sharding import initialize
from tests.megatron_bert.data.support import small_vocabulary
from tests.megatron_bert.finetuning.support import CONFIG, WORDS, random_instances, run_settings
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.megatron_bert.training.runs import rows

TOY, PACKAGE = Path(__file__).parent / "toy", "additions_of_a_user"
TABLES: tuple[dict[str, Any], ...] = (
    *(ACTIVATIONS, INTEGER_ACTIVATIONS, DECAYS, SCHEDULES, OPTIMIZERS, HEADS, TASKS, FORMATS),
)
#: What is added -> its file.
FILES = {
    "activation": "activation",
    "integer function": "integer_function",
    "learning-rate schedule": "learning_rate",
    "pipeline schedule": "pipeline_schedule",
    "optimizer": "optimizer",
    "kind of head": "head_kind",
    "task": "task",
    "checkpoint format": "checkpoint_format",
}


@pytest.fixture(scope="module", autouse=True)
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The additions, in a package that only the path of this process knows."""
    place, before = tmp_path_factory.mktemp("site"), [dict(table) for table in TABLES]
    shutil.copytree(TOY, place / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    sys.path.insert(0, str(place))
    try:
        import_module(PACKAGE)
        yield
    finally:
        sys.path.remove(str(place))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        for table, entries in zip(TABLES, before, strict=True):
            table.clear()
            table.update(entries)


@pytest.fixture(scope="module")
def trained(added: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that uses all of them."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(5)
    config = MegatronBertConfig(**CONFIG.to_dict() | {"hidden_act": "squared_relu"})
    MegatronBertForPreTraining(config).save_pretrained(folder / "encoder")
    save_tokenizer(load_tokenizer(small_vocabulary(folder, WORDS)), folder / "encoder", 24)
    rng = np.random.default_rng(1)
    for name, count in (("train", 160), ("valid", 40)):
        lines = []
        for _ in range(count):
            words, place = [f"w{number}" for number in rng.integers(30, size=6)], int(rng.integers(6))
            words[place] = "w77"
            lines.append(json.dumps({"text": " ".join(words), "place": place}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    finetune(settings(folder))
    return folder


def settings(folder: Path, **changes: Any) -> Any:
    return run_settings(
        folder,
        task={"name": "pointer"},
        data={"train": folder / "train.jsonl", "valid": folder / "valid.jsonl"},
        parallel={"schedule": "reversed"},
        optimizer={"name": "lion"},
        learning_rate={"peak": 1e-3, "schedule": "quadratic"},
        training__epochs=4,
        **changes,
    )


def test_a_run_learns_with_them(trained: Path) -> None:
    found = rows(trained / "run")
    training = [row for row in found if "learning_rate" in row]
    assert training[20]["learning_rate"] == pytest.approx(1e-3 * (1 - 20 / 40) ** 2)
    assert [row["valid_accuracy"] for row in found if "valid_accuracy" in row][-1] > 0.9
    with open_checkpoint(trained / "run") as state:
        assert (state.head, state.config.hidden_act) == ("pointer", "squared_relu")
        assert {name.partition(".")[0] for name in state.optimizer} <= {"exp_avg"}


def test_a_model_is_converted_to_a_format_and_back(trained: Path, tmp_path: Path) -> None:
    assert main(["convert", str(trained / "run"), str(tmp_path / "numpy"), "--to", "numpy"]) == 0
    convert(tmp_path / "numpy", tmp_path / "back", to="huggingface")
    with open_checkpoint(trained / "run") as source, open_checkpoint(tmp_path / "back") as back:
        assert (back.head, back.facts.architecture) == ("pointer", "MegatronBertForPointing")
        assert source.keys() == back.keys() >= {"pointer.weight"}
        assert all(source[name].load().equal(back[name].load()) for name in source)
    with pytest.raises(UserError, match="the source has a head for a token of a text, and Megatron's"):
        convert(trained / "run", tmp_path / "megatron", to="megatron")


def test_a_model_is_quantized(trained: Path) -> None:
    changes = {"optimizer__name": "lion", "learning_rate__schedule": "quadratic", "parallel__schedule": "reversed"}
    given = quantize_settings(trained, training__steps=2, training__evaluate_every=1, **changes)
    tree = given.model_dump(by_alias=True)
    tree["task"], tree["data"] = settings(trained).task.model_dump(), settings(trained).data.model_dump()
    quantize(type(given).model_validate(tree))
    folder = trained / "quantized"
    model = load_task(folder).model
    assert model is not None
    # Nothing of the activation is negative, so all 8 bits are for what is not.
    targets = [quantizer.target() for name, quantizer in quantizers(model) if name.endswith("gelu")]
    assert [(target.low, target.high) for target in targets] == [(0, 255)] * CONFIG.num_hidden_layers
    data = [f"data.valid={trained / 'valid.jsonl'}"]
    assert evaluate_files(folder, data, output=None, batch_size=8, device="cpu")["valid"]["accuracy"] > 0.9
    with pytest.raises(UserError, match="squared_relu, which integer engines do not have"):
        load_task(folder).stage("integer")


def test_integer_engines_run_a_kind_of_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name: they have what it says of itself."""
    model = BertForTask(CONFIG, "pointer", 1)
    initialize(model, seed=3)
    instances = random_instances("span", 5)
    batch = collate_instances(instances, range(len(instances)), Head("pointer", 1), most_features=1)
    quantize_model(model.eval(), QuantizationConfig())
    calibrate(model, [batch], model)
    with torch.no_grad():
        expected = model(batch)
        engine = IntegerModel.from_model(model, "reference")
        assert torch.equal(IntegerTask(engine)(batch), expected)
        tokens = torch.from_numpy(instances[0].features[0].tokens).long()
        answer = engine(tokens[None], token_type_ids=torch.from_numpy(instances[0].features[0].types).long()[None])
    assert list(answer) == ["logits"]
    assert torch.equal(answer.logits[0, instances[0].features[0].rows], expected[batch.owners == 0])
    monkeypatch.setattr(type(HEADS["pointer"]), "in_engines", False)
    with pytest.raises(UserError, match="the head of a pointer, which integer engines do not have"):
        IntegerModel.from_model(model)


def test_the_schedule_is_one_of_a_pipeline() -> None:
    schedule, kind = build_schedule("reversed", 4, 6), SCHEDULES["reversed"]
    validate(schedule)
    assert simulate(schedule).bubble == pytest.approx(kind.bubble(4, 6, 1))


@pytest.mark.parametrize("name", ["optimizer", "learning_rate"])
def test_names_that_no_table_has_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choose one of .*(lion|quadratic)"):
        run_settings(tmp_path, **{name: {"name" if name == "optimizer" else "schedule": "nothing"}})


# ---------------------------------------------------------------- what an addition takes


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no comments, documentation or empty lines."""
    text = path.read_text(encoding="utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        bool(line.split("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1) if number not in documented
    )


def test_the_guide_says_what_each_takes() -> None:
    """One file, of so many lines, and one line of a table."""
    entries = re.findall(r"  # (.+)$", (TOY / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(entries) == sorted(FILES)
    guide = (TOY.parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for what, file in FILES.items():
        found = re.search(rf"^\| {what} +\| `(\S+)` +\| `(\w+)` +\| (\d+) \+ 1 +\|$", guide, re.MULTILINE)
        assert found is not None, f"CONTRIBUTING.md has no row for: {what}"
        lines = lines_of_code(TOY / f"{file}.py")
        assert int(found[3]) == lines, f"CONTRIBUTING.md says {found[3]} lines for: {what}; it is {lines}"
        module = import_module(found[1].removesuffix(".py").replace("/", "."))
        assert any(getattr(module, found[2]) is table for table in TABLES), f"{found[1]} has no table {found[2]}"
