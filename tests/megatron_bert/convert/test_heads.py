# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned and quantized models through every format: heads, names of classes and ranges stay, or are said to go."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_bert.cli import main
from megatron_bert.convert.conversion import convert
from megatron_bert.convert.huggingface_names import IBERT
from megatron_bert.convert.inspection import inspect
from megatron_bert.convert.opening import open_checkpoint
from megatron_bert.convert.options import WriteOptions
from megatron_bert.convert.verification import verify
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.finetuning.fill_mask import FillMask
from megatron_bert.finetuning.finetune import finetune
from megatron_bert.finetuning.inference import evaluate_files, predict_stream
from megatron_bert.model.finetuning import BertForTask
from megatron_bert.quantizing.quantize import quantize
from parallel.errors import UserError
from tests.megatron_bert.data.support import small_vocabulary
from tests.megatron_bert.finetuning.support import WORDS, make_run, run_settings
from tests.megatron_bert.finetuning.test_transformers_models import LIKE_BERT, LIKE_ROBERTA, MODELS, make_model
from tests.megatron_bert.quantizing.support import quantize_settings
from tests.megatron_bert.training.runs import rows

FAMILIES = [*LIKE_BERT, *LIKE_ROBERTA]


@torch.no_grad()
def outputs(folder: Path, kind: str) -> list[Tensor]:
    """What transformers' class computes of a directory, all of whose weights it must find."""
    auto = getattr(transformers, f"AutoModelFor{MODELS[kind][0]}")
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert all(IBERT.is_range(key) for key in report["missing_keys"])
    assert not report["unexpected_keys"]
    ids = torch.tensor([[2, 7, 9, 11, 3]])
    found = model.eval()(input_ids=ids[None] if kind == "choice" else ids)
    return [value for name, value in found.items() if name.endswith("logits")]


def test_names_begin_with_that_of_the_encoder_once() -> None:
    key = "encoder.layer.0.output.dense.weight"
    assert IBERT.ours(key) == IBERT.ours(f"ibert.{key}") == IBERT.ours(f"roberta.{key}") is not None
    assert IBERT.ours(f"ibert.roberta.{key}") is None


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("family", ["MegatronBert", "Bert", "Roberta"])
def test_every_head_of_every_family(family: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = make_model(tmp_path / "source", family, kind)
    convert(source, tmp_path / "native", to="native")
    convert(tmp_path / "native", tmp_path / "back", to="huggingface")
    for found, expected in zip(outputs(tmp_path / "back", kind), outputs(source, kind), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"][0].endswith(MODELS[kind][0])
    if "id2label" in MODELS[kind][1]:
        assert config["id2label"] == {str(number): name for number, name in MODELS[kind][1]["id2label"].items()}
        assert "no, maybe, yes" in str(inspect(tmp_path / "native")) or kind == "token"
    if kind == "multi":
        assert config["problem_type"] == "multi_label_classification"


def test_norms_under_the_names_of_the_first_berts(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = make_model(tmp_path / "source", "Bert", "single")
    path, expected = source / "model.safetensors", outputs(source, "single")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    save_file(
        {re.sub("|".join(names), lambda kind: names[kind[0]], key): t for key, t in load_file(path).items()}, path
    )
    assert "bert.embeddings.LayerNorm.gamma" in load_file(path)
    convert(source, tmp_path / "back", to="huggingface")
    torch.testing.assert_close(outputs(tmp_path / "back", "single"), expected)


@pytest.mark.parametrize("to", ["megatron", "megatron-core"])
@pytest.mark.parametrize("kind", ["single", "choice"])
def test_heads_that_megatron_has(kind: str, to: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = make_model(tmp_path / "source", "MegatronBert", kind)
    report = convert(source, tmp_path / "megatron", to=to)
    assert "Megatron's checkpoints name no classes" in str(report)
    convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    for found, expected in zip(outputs(tmp_path / "back", kind), outputs(source, kind), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["token", "span"])
def test_heads_that_megatron_has_not(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = make_model(tmp_path / "source", "MegatronBert", kind)
    with pytest.raises(UserError, match="Megatron's checkpoints have heads for classes and choices only"):
        convert(source, tmp_path / "megatron", to="megatron")
    assert not (tmp_path / "megatron").exists()


class TestRuns:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A fine-tuning run, and a quantization run from it."""
        folder = tmp_path_factory.mktemp("runs")
        finetune(make_run(folder, layers=2, training__steps=4))
        quantize(quantize_settings(folder, training__steps=2, training__evaluate_every=2))
        return folder

    def scores(self, folder: Path, model: Path, *overrides: str) -> Any:
        given = [f"data.valid={folder / 'valid.jsonl'}", *overrides]
        return evaluate_files(model, given, output=None, batch_size=8, device="cpu")["valid"]

    @pytest.mark.parametrize("to", ["huggingface", "native"])
    @pytest.mark.parametrize("run", ["run", "quantized"])
    def test_a_converted_run_gives_its_scores(self, folder: Path, tmp_path: Path, run: str, to: str) -> None:
        convert(folder / run, tmp_path / "result", to=to)
        vocabulary = f"tokenizer.path={folder / 'encoder'}"
        found = self.scores(folder, tmp_path / "result", vocabulary)
        assert found == pytest.approx(self.scores(folder, folder / run), rel=1e-6)
        with open_checkpoint(folder / run) as before, open_checkpoint(tmp_path / "result") as after:
            assert after.ranges == before.ranges
            assert after.task == before.task

    def test_a_checkpoint_of_a_run_serves_too(self, folder: Path) -> None:
        """Its vocabulary is that of what the run started from."""
        for run, step in (("run", 4), ("quantized", 2)):
            checkpoint = folder / run / "checkpoints" / f"step_{step:08d}"
            assert checkpoint.is_dir()
            assert self.scores(folder, checkpoint) == pytest.approx(self.scores(folder, folder / run), rel=1e-6)

    def test_classes_without_names_get_those_that_are_given(self, folder: Path, tmp_path: Path) -> None:
        convert(folder / "run", tmp_path / "model.zip", to="megatron")
        given = ("task.labels=[a,b,c]", f"tokenizer.path={folder / 'encoder'}")
        expected = self.scores(folder, folder / "run")
        assert self.scores(folder, tmp_path / "model.zip", *given)["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        answers = io.StringIO()
        row = io.StringIO('{"text": "w1 w40"}')
        predict_stream(tmp_path / "model.zip", row, answers, batch_size=1, device="cpu", overrides=[given[1]])
        assert list(json.loads(answers.getvalue())["probabilities"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
        with pytest.raises(UserError, match=r"holds no vocabulary: give tokenizer\.path=PATH"):
            self.scores(folder, tmp_path / "model.zip")

    def test_megatron_has_no_place_for_ranges(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is quantized, and Megatron's checkpoints have no place for its ranges"):
            convert(folder / "quantized", tmp_path / "result", to="megatron")

    @pytest.mark.parametrize("keep_head", [True, False])
    def test_what_a_run_leaves_behind_is_said(
        self, folder: Path, tmp_path: Path, keep_head: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = run_settings(
            folder,
            model={"from": folder / "quantized", "keep_head": keep_head},
            training__steps=1,
            training__run_dir=tmp_path / "again",
        )
        finetune(settings)
        assert rows(tmp_path / "again")
        said = capsys.readouterr().out
        assert "is quantized: its weights are taken in floating point, and its ranges are left behind" in said
        assert ("classifier.weight of" in said) != keep_head

    def test_an_archive_is_unpacked_once(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """For all seeds of a command."""
        import zipfile

        from megatron_bert.convert import archive

        convert(folder / "encoder", tmp_path / "megatron", to="megatron")
        with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path in (tmp_path / "megatron").rglob("*"):
                file.write(path, path.relative_to(tmp_path / "megatron"))
        unpacked: list[str] = []
        chunks = archive._chunks
        monkeypatch.setattr(archive, "_chunks", lambda *a: (unpacked.append(a[1].filename), chunks(*a))[1])
        settings = run_settings(
            folder,
            model={"from": tmp_path / "model.zip"},
            tokenizer={"path": folder / "encoder"},
            training__steps=1,
            training__seeds=[1, 2],
            training__run_dir=tmp_path / "seeds",
        )
        finetune(settings)
        assert sorted(Path(name).name for name in unpacked) == [
            "latest_checkpointed_iteration.txt",
            "model_optim_rng.pt",
        ]

    def test_a_task_is_one_model(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 3.9 billion parameters there is no room for a second."""
        from megatron_bert.finetuning import saved

        built: list[str] = []
        build = BertForTask.__init__

        def count(self: BertForTask, *arguments: Any, **named: Any) -> None:
            built.append(type(self).__name__)
            build(self, *arguments, **named)

        monkeypatch.setattr(BertForTask, "__init__", count)
        for run in ("run", "quantized"):
            assert saved.load_task(folder / run).model is not None
            assert len(built) == 1, run
            built.clear()


def test_the_tensors_of_a_directory_are_mapped(tmp_path: Path) -> None:
    """What is read takes no memory of its own until it is changed."""
    folder = make_model(tmp_path, "MegatronBert", "masked")
    with open_checkpoint(folder) as state:
        table = state["embeddings.word_embeddings.weight"].load()
        address = table.untyped_storage().data_ptr()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        ranges_of_file = [
            [int(end, 16) for end in line.split()[0].split("-")] for line in maps if line.endswith("model.safetensors")
        ]
        assert any(start <= address < end for start, end in ranges_of_file)
        table.zero_()
    assert transformers.AutoModelForMaskedLM.from_pretrained(folder).get_input_embeddings().weight.any()


@pytest.mark.parametrize("family", ["MegatronBert", "Roberta"])
def test_verification_computes_as_transformers(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family, "masked")
    line = " ".join(f"w{number}" for number in range(14))
    (tmp_path / "texts.txt").write_text(line, encoding="utf-8")
    with open_checkpoint(folder) as state:
        found = verify(state, load_tokenizer(folder), tmp_path / "texts.txt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(line, return_tensors="pt")["input_ids"]
    slots = torch.arange(2, ids.shape[1] - 1, 6)
    labels = ids[0, slots].clone()
    ids[0, slots] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()(ids).logits[0, slots]
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize(("family", "longest"), [("MegatronBert", 34), ("Roberta", 32)])
def test_a_converted_vocabulary_knows_its_model(family: str, longest: int, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    folder = make_model(tmp_path / "source", family, "masked")
    convert(folder, tmp_path / "result", to="huggingface", write=WriteOptions(tokenizer=folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "result")
    with open_checkpoint(folder) as state:
        assert tokenizer.model_max_length == state.config.longest_sequence == longest
    assert ("token_type_ids" in tokenizer("w1")) == (family == "MegatronBert")


class TestFillMask:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_directory_of_transformers(self, family: str, tmp_path: Path) -> None:
        folder = make_model(tmp_path, family, "masked")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
        text = f"w7 w31 {tokenizer.mask_token} w2"
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, inputs["input_ids"][0] == tokenizer.mask_token_id]
        chances = logits.softmax(dim=1)  # of all words, as their pipeline has it
        chances[:, tokenizer.all_special_ids] = -1.0
        best = chances.topk(3)
        guesses = FillMask.from_checkpoint(folder)(text, top=3)
        assert [guess.token for guess in guesses] == tokenizer.convert_ids_to_tokens(best.indices[0].tolist())
        torch.testing.assert_close(torch.tensor([g.probability for g in guesses]), best.values[0], rtol=1e-4, atol=1e-6)

    def test_an_archive_with_its_vocabulary_elsewhere(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "source").mkdir()
        folder = make_model(tmp_path / "source", "MegatronBert", "masked")
        convert(folder, tmp_path / "model.zip", to="megatron")
        vocabulary = small_vocabulary(tmp_path, WORDS)
        text = "w7 [MASK] w2"
        assert main(["fill-mask", str(tmp_path / "model.zip"), text]) == 2
        assert "holds no vocabulary: give --tokenizer" in capsys.readouterr().err
        command = ["fill-mask", str(tmp_path / "model.zip"), text, "--tokenizer", str(vocabulary)]
        assert main([*command, "--layer-norm-eps", "1e-5"]) == 0
        found = capsys.readouterr().out
        assert main(["fill-mask", str(folder), text]) == 0
        assert found == capsys.readouterr().out

    def test_a_model_without_the_head(self, tmp_path: Path) -> None:
        folder = make_model(tmp_path, "Bert", "single")
        with pytest.raises(UserError, match="has no masked-language head"):
            FillMask.from_checkpoint(folder)
