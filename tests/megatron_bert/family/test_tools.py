# SPDX-License-Identifier: Apache-2.0
"""The classes in the hands of transformers' Trainer and pipelines, Accelerate and PEFT."""

from __future__ import annotations

from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from torch.nn.parallel import scatter_gather

import megatron_bert
from megatron_bert import AutoTokenizer
from megatron_bert.data.tokenizers import load_tokenizer
from megatron_bert.family.tokenizer import save_tokenizer
from tests.commands import run_python
from tests.megatron_bert.family import support as megatron
from tests.megatron_bert.family.support import (
    CLOSE,
    HEADS,
    assert_outputs_close,
    batch_for,
    build,
    config_of,
    labels_for,
)
from tests.megatron_bert.ibert.family import support as ibert

WORDS = "the dog sees a cat and sky is blue good bad it was not very paris france capital of".split()  # noqa: SIM905
SENTENCES = ["the dog sees a cat", "it was good", "it was very bad", "the sky is blue"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    save_tokenizer(load_tokenizer(folder), folder, 20)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _own_state():
    """What a Trainer asks of Accelerate (a number format) holds for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state()


def _arguments(folder: Path, **changes) -> transformers.TrainingArguments:
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "seed": 1,
    }
    return transformers.TrainingArguments(**usual | changes)


@pytest.mark.parametrize("family", ["MegatronBert", "IBert"])
def test_trainer(family, tokenizer, tmp_path):
    """bfloat16, accumulated gradients, recomputation, evaluation, the best model at the end, saving and resuming."""
    head = "ForSequenceClassification"
    make = megatron if family == "MegatronBert" else ibert
    rows = [tokenizer(text) | {"labels": number % 2} for number, text in enumerate(SENTENCES)]
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    arguments = _arguments(
        tmp_path / "run",
        bf16=True,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        max_steps=4,
        load_best_model_at_end=True,
        **every,
    )

    def trainer(model):
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )

    first = trainer(make.build(head, make.config_of(head, num_labels=2)))
    first.train()
    assert first.model.dtype == torch.float32
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 4
    # What was saved halfway goes on to the same end.
    again = trainer(make.build(head, make.config_of(head, num_labels=2)))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-2)
    first.save_model(str(tmp_path / "model"))
    loaded = type(first.model).from_pretrained(tmp_path / "model")
    peer = getattr(transformers, f"{family}{head}").from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    trained = first.model.state_dict()
    assert all(tensor.equal(trained[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(peer.eval()(**batch).logits, loaded(**batch).logits, **CLOSE)


@pytest.mark.parametrize("family", ["MegatronBert", "IBert"])
def test_noisy_embeddings(family, tokenizer, tmp_path):
    """NEFTune's noise is even, within alpha / sqrt(S H) of the padded batch, and gone after training."""
    head, make = "ForSequenceClassification", megatron if family == "MegatronBert" else ibert
    rows = [tokenizer(text) | {"labels": number % 2} for number, text in enumerate(SENTENCES)]
    model = make.build(head, make.config_of(head, num_labels=2))
    words, seen = model.get_input_embeddings(), []

    def keep(_, inputs, output):
        seen.append((inputs[0].shape, output.detach().clone()))

    class AfterNoise(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            words.register_forward_hook(keep)

    words.register_forward_hook(keep)
    transformers.Trainer(
        model=model,
        args=_arguments(tmp_path, max_steps=1, neftune_noise_alpha=5.0),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[AfterNoise()],
    ).train()
    (ids, plain), (_, noisy) = seen
    assert plain.shape == (*ids, 32)
    noise, bound = noisy - plain, 5.0 / (ids[1] * 32) ** 0.5
    assert 0.95 * bound < float(noise.abs().max()) <= bound * (1 + 1e-4)
    assert float(noise.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert len(words._forward_hooks) == 2


def test_accelerate():
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, batch = build("ForTokenClassification"), batch_for("ForTokenClassification")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader([{name: t[row] for name, t in batch.items()} for row in range(3)], 2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    tags, seen = labels_for("ForTokenClassification")["labels"], 0
    for rows in loader:
        count = len(rows["input_ids"])
        out = model(**rows, labels=tags[:count])
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        logits, _ = accelerator.gather_for_metrics((out.logits, rows["input_ids"]))
        assert logits.dtype == torch.float32  # as Accelerate converts what a model returns
        seen += len(logits)
    assert seen == 3
    assert type(accelerator.unwrap_model(model)).__name__ == "MegatronBertForTokenClassification"


def test_outputs_of_replicas_are_gathered(monkeypatch):
    """DataParallel puts what replicas return together, field by field; copying between GPUs is all that is left out."""
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *parts: torch.cat(parts, dim))
    for head in HEADS:
        model, batch = build(head), batch_for(head)
        options = {"output_hidden_states": True} | ({"use_cache": False} if head == "ForCausalLM" else {})
        parts = [
            model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}, **options) for row in range(3)
        ]
        whole, expected = scatter_gather.gather(parts, "cpu"), model(**batch, **options)
        assert type(whole) is type(expected)
        assert_outputs_close(whole, expected)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
@pytest.mark.parametrize("family", ["MegatronBert", "IBert"])
def test_adapters(family, targets, tmp_path):
    """LoRA finds the layers by name or by kind, learns, and is merged or loaded again."""
    head = "ForSequenceClassification"
    make = megatron if family == "MegatronBert" else ibert
    model, batch = make.build(head), make.batch_for(head) | labels_for(head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    loss = adapted.train()(**batch).loss
    loss.backward()
    torch.optim.SGD((each for each in adapted.parameters() if each.requires_grad), lr=1e-3).step()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("query.lora_A" in name for name in trained)
    assert ("intermediate.dense.lora_A" in "".join(trained)) == (targets == "all-linear")
    adapted.eval()
    expected = adapted(**batch).logits
    assert adapted(**batch).loss < loss
    with adapted.disable_adapter():
        assert not adapted(**batch).logits.allclose(expected, atol=1e-2)
    adapted.save_pretrained(tmp_path)
    fresh = make.build(head)
    assert all(tensor.equal(before[name]) for name, tensor in fresh.state_dict().items())
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected, **CLOSE)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


PIPELINES = {
    "fill-mask": ("ForMaskedLM", "the [MASK] sees a cat", lambda found: len(found) == 5 and "token_str" in found[0]),
    "text-classification": ("ForSequenceClassification", SENTENCES, lambda found: len(found) == len(SENTENCES)),
    "token-classification": ("ForTokenClassification", SENTENCES[0], lambda found: len(found) == 5),
    "feature-extraction": ("Model", SENTENCES[0], lambda found: len(found[0][0]) == 32),
}


@pytest.mark.parametrize("family", ["MegatronBert", "IBert"])
@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(task, family, tokenizer):
    head, text, right = PIPELINES[task]
    make = megatron if family == "MegatronBert" else ibert
    model = make.build(head)
    inputs = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    if family == "IBert":
        inputs.model_input_names = ["input_ids", "attention_mask"]
    pipe = transformers.pipeline(task, model=model, tokenizer=inputs, device="cpu")
    assert right(pipe(text))


def test_vocabularies_grow_as_in_run_mlm(tokenizer):
    model = build("ForMaskedLM", config_of("ForMaskedLM", vocab_size=20, pad_token_id=0))
    assert len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer))
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()


def test_text_is_generated_by_all_strategies(tokenizer):
    model = build("ForCausalLM", config_of("ForCausalLM", is_decoder=True, eos_token_id=3))
    tokenizer.padding_side = "left"
    batch = tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    tokenizer.padding_side = "right"
    for given in (
        {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "min_new_tokens": 2},
        {"num_beams": 2, "do_sample": True, "return_dict_in_generate": True, "output_scores": True},
    ):
        torch.manual_seed(0)
        found = model.generate(**batch, max_new_tokens=4, **given)
        sequences = found if torch.is_tensor(found) else found.sequences
        assert len(sequences) == 2 * given.get("num_return_sequences", 1)
        assert sequences.shape[1] <= batch["input_ids"].shape[1] + 4


def test_encoder_decoder():
    encoder = build("Model", add_pooling_layer=False)
    decoder = build("ForCausalLM", config_of("ForCausalLM", is_decoder=True, add_cross_attention=True))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    batch = batch_for("Model")
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    loss = model(**ids, labels=batch["input_ids"][:, :5].contiguous()).loss
    loss.backward()
    assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    text = model.generate(**ids, max_new_tokens=4, decoder_start_token_id=2)
    cached = model.generate(**ids, max_new_tokens=4, decoder_start_token_id=2, use_cache=False)
    assert text.equal(cached)


def test_every_class_is_one_of_transformers():
    for name in megatron_bert.__all__:
        kind = getattr(megatron_bert, name)
        if name.endswith("Config"):
            assert issubclass(kind, transformers.PreTrainedConfig)
        elif name.startswith(("MegatronBert", "IBert")):
            assert issubclass(kind, transformers.PreTrainedModel)


def test_auto_classes_on_request(tmp_path):
    """In a process of its own, as it changes what transformers gives."""
    build("ForMaskedLM").save_pretrained(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(f"""
import megatron_bert, transformers
path = {str(tmp_path)!r}
before = transformers.AutoModelForMaskedLM.from_pretrained(path)
assert type(before).__module__.startswith("transformers."), type(before)
megatron_bert.register_auto_classes()
assert type(transformers.AutoModelForMaskedLM.from_pretrained(path)) is megatron_bert.MegatronBertForMaskedLM
assert type(transformers.AutoConfig.from_pretrained(path)) is megatron_bert.MegatronBertConfig
assert type(transformers.AutoModel.from_config(megatron_bert.IBertConfig(**{{
    "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9, "intermediate_size": 8
}}))) is megatron_bert.IBertModel
""")
    ended = run_python(str(program), folder=tmp_path)
    assert ended.code == 0, ended.text


@pytest.mark.parametrize("family", [megatron, ibert], ids=["megatron-bert", "i-bert"])
def test_a_class_derived_from_the_base(family, tmp_path):
    model_class = type(family.build("Model"))
    base = next(kind for kind in model_class.__mro__ if kind.__name__.endswith("BertPreTrainedModel"))

    class Own(base):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, model_class(config))
            self.extra = torch.nn.Linear(config.hidden_size, 3)
            self.post_init()

        def forward(self, input_ids):
            return self.extra(self.base_model(input_ids).last_hidden_state)

    own = Own(family.config_of("Model")).eval()
    ids = batch_for("Model")["input_ids"]
    own.save_pretrained(tmp_path)
    again, found = Own.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert again(ids).equal(own(ids))
    assert own.extra.weight.std() < 2 * own.config.initializer_range
    assert model_class.from_pretrained(tmp_path)(ids).last_hidden_state.equal(own.base_model(ids).last_hidden_state)


def test_configurations_of_transformers_are_taken(tmp_path):
    config = transformers.MegatronBertConfig(**config_of("Model").to_diff_dict() | {"num_labels": 5}, mine="kept")
    model = megatron_bert.MegatronBertForSequenceClassification(config)
    assert (type(model.config), model.config.num_labels, model.config.mine) == (
        megatron_bert.MegatronBertConfig,
        5,
        "kept",
    )
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.MegatronBertConfig
    again = type(model).from_pretrained(tmp_path, config=theirs)
    assert type(again.config) is megatron_bert.MegatronBertConfig
    ids = batch_for("Model")["input_ids"]
    assert again(ids).logits.equal(model.eval()(ids).logits)
