# SPDX-License-Identifier: Apache-2.0
"""Quantizing models of every kind, calibration, ranges in state dicts, reports, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import megatron_bert
from megatron_bert.config_file import validated
from megatron_bert.family.causal import MegatronBertForCausalLM
from megatron_bert.family.classification import MegatronBertForSequenceClassification
from megatron_bert.family.language import MegatronBertForMaskedLM
from megatron_bert.ibert import (
    QuantizationConfig,
    Quantizer,
    as_table,
    calibrate,
    compare_with_float,
    freeze_ranges,
    in_mode,
    named_ranges,
    plot,
    quantize_model,
    quantizers,
    unfreeze_ranges,
    update_ranges,
)
from megatron_bert.ibert.layer import check_layer
from megatron_bert.ibert.observers import BINS, bin_edges, histogram, least_error_range, percentile_range
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.layer import TransformerLayer
from megatron_bert.model.pretraining import BertForPretraining
from megatron_bert.model.sequences import SequenceLayout
from megatron_bert.quantizing.settings import QuantizationSettings
from megatron_bert.section import Section
from parallel.errors import UserError
from parallel.pipeline.stage import StagePart
from tests.megatron_bert.ibert.support import make_stack, padded, quantized_stack, sequences
from tests.megatron_bert.model.support import CONFIG, LENGTH, LENGTHS, make_batch, make_model, total_loss

SETTINGS = QuantizationConfig()


def _calibrated(**settings):
    model = make_model().eval()
    quantize_model(model, QuantizationConfig(**settings))
    calibrate(model, [make_batch()], model)
    return model


# ---------------------------------------------------------------- models


def test_parameters_stay_the_same_objects_under_the_same_names():
    model = make_model()
    before = dict(model.named_parameters())
    float_output = model(make_batch())
    assert quantize_model(model, QuantizationConfig(equalization="none")) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    with in_mode(model, "float"):
        assert torch.equal(model(make_batch()).masked, float_output.masked)
    assert set(model.state_dict()) == set(before) | set(named_ranges(model))


def test_pipeline_stages_give_the_bits_of_the_whole_model():
    whole, batch = _calibrated(), make_batch()
    expected, state, hidden = whole(batch, 3), whole.state_dict(), None
    for part in (StagePart(range(1), first=True, last=False), StagePart(range(1, 2), first=False, last=True)):
        stage = BertForPretraining(CONFIG, part=part)
        quantize_model(stage, SETTINGS)
        assert set(stage.state_dict()) < set(state)
        stage.load_state_dict({name: state[name] for name in stage.state_dict()})
        hidden = stage(batch, 3, hidden)
    assert torch.equal(hidden.masked, expected.masked)
    assert torch.equal(hidden.pair, expected.pair)


def _small(**changes) -> MegatronBertConfig:
    return megatron_bert.MegatronBertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MegatronBertForSequenceClassification, {}),
        (MegatronBertForMaskedLM, {}),
        (MegatronBertForCausalLM, {"is_decoder": True}),
    ],
)
def test_public_classes(kind, changes):
    model = kind(_small(**changes)).eval()
    ids = torch.randint(1, 90, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    quantize_model(model, SETTINGS)
    calibrate(model, [ids], lambda batch: model(batch, attention_mask=mask))
    with torch.no_grad():
        integer = model(ids, attention_mask=mask).logits
        with in_mode(model, "float"):
            real = model(ids, attention_mask=mask).logits
    rows = mask.bool() if integer.dim() == 3 else slice(None)
    assert float((integer - real)[rows].square().sum() / real[rows].square().sum()) < 10**-2
    assert torch.equal(integer * 2**12, (integer * 2**12).round())


def test_a_decoder_goes_on_from_its_cache():
    model = MegatronBertForCausalLM(_small(is_decoder=True)).eval()
    ids = torch.randint(1, 90, (2, 9))
    quantize_model(model, SETTINGS)
    calibrate(model, [ids], model)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    assert torch.equal(torch.cat((first.logits, rest), dim=1), whole)


def test_attention_probabilities_on_request():
    model = MegatronBertForMaskedLM(_small()).eval()
    ids = torch.randint(1, 90, (2, 9))
    quantize_model(model, SETTINGS)
    calibrate(model, [ids], model)
    with torch.no_grad():
        integer = model(ids, output_attentions=True).attentions
        with in_mode(model, "float"):
            real = model(ids, output_attentions=True).attentions
    for one, other in zip(integer, real, strict=True):
        torch.testing.assert_close(one.sum(-1), torch.ones_like(one.sum(-1)))
        assert float((one - other).abs().max()) < 0.1
    with pytest.raises(UserError, match="head_mask"):
        model(ids, head_mask=torch.ones(4))


# ---------------------------------------------------------------- calibration


def test_calibration_finds_the_largest_magnitude():
    stack = make_stack("pre", 1)
    batch = padded(*sequences(12, 5))
    with torch.no_grad():
        hidden = stack(*batch)
    quantize_model(stack, SETTINGS)
    assert calibrate(stack, [batch], lambda b: stack(*b)) == 1
    assert float(named_ranges(stack)["encoder.final_norm.ranges.output.range"]) == float(hidden.abs().max())


def test_scales_represent_their_ranges():
    for bits in (10, 15, 16):
        for kind in ("signed", "attention", "stream", "gelu"):
            quantizer = Quantizer(kind, QuantizationConfig(residual_bits=bits))
            for limit in (0.0, 1e-30, 1e-6, 0.01, 1.0, 1e4):
                quantizer.range.fill_(limit)
                scale, target = quantizer.scale(), quantizer.target()
                assert scale >= 2.0**-20
                steps = limit / scale
                assert steps <= target.high + 0.5
                if kind == "stream":  # within what a term of a sum holds
                    assert steps <= 2**14 - 1
                if limit >= 1.0:  # with less than a bit to spare
                    assert steps > min(target.high, 2**14) / 2.01


def test_a_tensor_of_zeros_has_a_range():
    """Of a layer that was pruned away: calibration sees nothing but zeros there, and the model runs."""
    stack = make_stack("pre", 2)
    with torch.no_grad():
        for parameter in stack.encoder.layers["1"].attention.parameters():
            parameter.zero_()
    quantize_model(stack, SETTINGS)
    batch = padded(*sequences(20, 7))
    calibrate(stack, [batch], lambda b: stack(*b))
    assert float(named_ranges(stack)["encoder.layers.1.ranges.query.range"]) == 0.0
    with torch.no_grad():
        integer = stack(*batch)
        with in_mode(stack, "float"):
            real = stack(*batch)
    assert float((integer - real).square().sum() / real.square().sum()) < 10**-2.5


@pytest.mark.parametrize("observer", ["min_max", "percentile", "mse"])
def test_a_batch_without_tokens_says_nothing(observer):
    quantizer = Quantizer("signed", QuantizationConfig(observer=observer))
    quantizer.observe(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))
    quantizer.follow()
    assert not quantizer.known
    quantizer.observe(torch.full((2, 3), 2.0))
    quantizer.follow()
    assert float(quantizer.range) == pytest.approx(2.0, rel=0.03)


def test_weights_gone_wild_leave_attention_to_the_best_key():
    """Queries and keys 10,000 times as large: every numerator but the largest is 0, and nothing wraps."""
    stack = make_stack("pre", 1)
    attention = stack.encoder.layers["0"].attention
    with torch.no_grad():
        attention.query_key_value.weight.view(4, 3, 8, 32)[:, :2].mul_(1e4)
        attention.query_key_value.bias.view(4, 3, 8)[:, :2].mul_(1e4)
    quantize_model(stack, SETTINGS)
    batch = padded(*sequences(30))
    calibrate(stack, [batch], lambda b: stack(*b))
    with torch.no_grad():
        integer = stack(*batch)
        with in_mode(stack, "float"):
            real = stack(*batch)
    # Ties of the rounded scores may fall elsewhere, in a token or two.
    error = (integer - real).norm(dim=1) / real.norm(dim=1)
    assert float(error.median()) < 0.05


def test_padding_does_not_count_inside_of_layers():
    stack = make_stack("pre", 2)
    quantize_model(stack, SETTINGS)
    ids, longest = sequences(12, 5)
    ranges = []
    for length in (longest, 400):
        calibrate(stack, [padded(ids, length)], lambda b: stack(*b))
        ranges.append({n: float(v) for n, v in named_ranges(stack).items() if ".layers." in n})
    for name, value in ranges[0].items():
        assert ranges[1][name] == pytest.approx(value, rel=1e-5), name


def test_ranges_follow_training_until_they_are_frozen():
    model = _calibrated(momentum=0.5)
    model.train()
    before = {name: float(value) for name, value in named_ranges(model).items()}
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(3.0)

    def one_step():
        total_loss(model, make_batch()).backward()
        inside = {name: float(value) for name, value in named_ranges(model).items()}
        update_ranges(model)
        return inside, {name: float(value) for name, value in named_ranges(model).items()}

    inside, after = one_step()
    assert inside == before  # a step is a function of the ranges it began with
    name = "embeddings.ranges.output.range"
    assert 1.3 * before[name] < after[name] < 3.0 * before[name]
    freeze_ranges(model)
    assert one_step()[1] == after
    unfreeze_ranges(model)
    model.eval()
    assert one_step()[1] == after  # evaluation never moves ranges
    model.train()
    assert one_step()[1][name] > after[name]


def _filled():
    """The packed batch with two sequences of filling behind, of tokens that the others do not have in these places."""
    packed = make_batch(packed=True)
    fill = 2 * LENGTHS[-1]
    row = torch.arange(fill)
    more = {"tokens": row + 60, "positions": row % LENGTHS[-1], "types": row % 2, "samples": row}
    longer = {name: torch.cat((getattr(packed, name), values)) for name, values in more.items()}
    return replace(packed, layout=SequenceLayout.packed(torch.tensor(LENGTHS), LENGTH, fill), **longer)


@pytest.mark.parametrize("force", ["none", "nonlinear"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_ranges_of_layers_follow_real_tokens_alone(placement, force):
    """As in calibration: padding and filling depend on how a batch is divided into micro batches and over ranks."""
    model = make_model(layer_norm_placement=placement)
    quantize_model(model, QuantizationConfig(force_dequant=force, momentum=0.0))
    calibrate(model, [make_batch(packed=True)], model)
    found = []
    for batch in (make_batch(packed=True), make_batch(), _filled()):
        trained = copy.deepcopy(model).train()
        trained(batch, 3)
        update_ranges(trained)
        found.append({name: float(value) for name, value in named_ranges(trained).items() if "layers" in name})
    if force == "none":  # what floating point computes in another order may be off in the last bit
        assert found[0] == found[1] == found[2]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=0.02)


def test_ranges_travel_with_the_state_dict():
    model = _calibrated()
    other = make_model()
    quantize_model(other, SETTINGS)
    with pytest.raises(UserError, match="calibrate"):
        other(make_batch())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(make_batch()).masked, model(make_batch()).masked)


def test_ranges_of_a_histogram():
    x = torch.randn(200_000)
    counts = histogram(x.abs())
    assert int(counts.sum()) == x.numel()
    assert len(bin_edges()) == BINS == len(counts)
    for share in (90.0, 99.0, 99.9):
        exact = float(x.abs().quantile(share / 100)) if x.numel() < 2**24 else 0.0
        # The upper end of a bin 2.2% wide.
        assert exact <= percentile_range(counts, share) <= 1.03 * exact

    def error(limit: float) -> float:
        scale = limit / 7
        return float(((x / scale).round().clamp(-7, 7) * scale - x).square().mean())

    found = least_error_range(counts, 7)  # 4 bits, whose best range is well inside of the tails
    assert found < 0.75 * float(x.abs().max())
    assert error(found) <= 1.03 * min(error(limit) for limit in torch.linspace(1.0, 4.5, 71).tolist())
    assert percentile_range(torch.zeros(BINS, dtype=torch.int64), 99.0) > 0
    assert histogram(torch.zeros(5))[0] == 5


def test_percentile_ranges_leave_outliers_out():
    stacks = []
    for observer in ("min_max", "percentile"):
        torch.manual_seed(2)
        stack = make_stack("pre", 1)
        with torch.no_grad():
            stack.encoder.layers["0"].attention.query_key_value.bias[0] += 40.0
        quantize_model(stack, QuantizationConfig(observer=observer, percentile=95.0))
        calibrate(stack, [padded(*sequences(30, 30))], lambda b, stack=stack: stack(*b))
        stacks.append({n: float(v) for n, v in named_ranges(stack).items()})
    name = "encoder.layers.0.ranges.query.range"
    assert stacks[1][name] < 0.5 * stacks[0][name]
    stream = "encoder.layers.0.ranges.middle.range"
    assert stacks[1][stream] == stacks[0][stream]  # always the largest magnitude


@pytest.mark.parametrize("kind", ["gamma", "smooth"])
def test_equalization_keeps_the_float_function_and_helps_outlier_gains(kind):
    def noise(equalization: str) -> tuple[float, torch.Tensor]:
        torch.manual_seed(2)
        stack = make_stack("pre", 2)
        with torch.no_grad():
            for layer in stack.encoder.layers.values():
                layer.mlp_norm.weight[3] *= 30.0
                layer.mlp.intermediate.weight[:, 3] /= 30.0
        quantize_model(stack, QuantizationConfig(equalization=equalization))
        batch = padded(*sequences(30, 30))
        calibrate(stack, [batch], lambda b: stack(*b))
        with torch.no_grad():
            integer = stack(*batch)
            with in_mode(stack, "float"):
                real = stack(*batch)
        return float((integer - real).square().sum() / real.square().sum()), real

    plain, equalized = noise("none"), noise(kind)
    torch.testing.assert_close(plain[1], equalized[1], rtol=1e-4, atol=1e-4)
    assert equalized[0] < 0.5 * plain[0]


# ---------------------------------------------------------------- report


def test_report(tmp_path):
    stack = quantized_stack("post", 2)
    batch = padded(*sequences(40, 25))
    named_ranges(stack)["encoder.layers.1.ranges.query.range"].div_(3)
    ranges = {name: float(value) for name, value in named_ranges(stack).items()}
    rows = compare_with_float(stack, [batch, batch], lambda b: stack(*b))
    assert {name: float(value) for name, value in named_ranges(stack).items()} == ranges
    by_name = {row.name: row for row in rows}
    assert by_name.keys() == {name for name, _ in quantizers(stack)}
    clamped = by_name["encoder.layers.1.ranges.query"]
    assert clamped.layer == 1
    assert clamped.saturation > 0.02
    assert clamped.snr < by_name["encoder.layers.0.ranges.query"].snr - 3
    assert 44 < by_name["embeddings.ranges.sum"].snr < 56  # of words of 8 bits
    # Uniform rounding noise is a twelfth of a step squared.
    first = by_name["encoder.layers.0.ranges.attention_input"]
    assert 38 < first.snr < 48
    table = as_table(rows)
    assert table.count("<- worst") == 1
    assert len(table.splitlines()) == len(rows) + 1
    plot(rows, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="at least one batch"):
        compare_with_float(stack, [], lambda b: stack(*b))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 4),
        ("activation_bits", 9),
        ("residual_bits", 32),
        ("observer", "max"),
        ("momentum", 1.0),
        ("percentile", 10.0),
        ("force_dequant", "tanh"),
        ("layer_force_dequant", {3: "all"}),
        ("equalization", "yes"),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(UserError, match=f"^{field}") as found:
        QuantizationConfig(**{field: value})
    with pytest.raises(UserError) as in_settings:
        validated({"quantization": {field: value}}, Owner, "file")
    assert str(in_settings.value) == f"file: quantization.{found.value}", "one definition, named by where it is used"


class Owner(Section):
    quantization: QuantizationSettings


def test_unknown_settings_are_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"^unknown setting Weight_bits; did you mean weight_bits\?$"):
        QuantizationConfig(Weight_bits=8)


def test_defaults_are_those_of_a_run():
    assert QuantizationSettings().config() == QuantizationConfig()


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"layer_norm_placement": "post"}, {"equalization": "gamma"}, "post-layer-norm"),
        ({"intermediate_size": 12544}, {}, "intermediate size"),
        ({"hidden_act": "relu"}, {}, "hidden_act relu"),
        ({"hidden_act": "silu"}, {}, "hidden_act silu"),
    ],
)
def test_what_integers_do_not_cover_is_refused_and_nothing_changed(changes, settings, message):
    sizes = {"num_hidden_layers": 1} | changes
    model = make_stack(sizes.pop("layer_norm_placement", "pre"), 1, **sizes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        quantize_model(model, QuantizationConfig(**settings))
    assert list(quantizers(model)) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_residual_stream_that_overflows_layer_norm_is_refused():
    with torch.device("meta"):
        layer = TransformerLayer(MegatronBertConfig(hidden_size=10240, intermediate_size=12288))
    check_layer(layer, QuantizationConfig(residual_bits=15))
    with pytest.raises(UserError, match="residual_bits to 15 or less"):
        check_layer(layer, QuantizationConfig(residual_bits=16))


def test_misuse_is_explained():
    model = _calibrated()
    with pytest.raises(UserError, match="already"):
        quantize_model(model, SETTINGS)
    with pytest.raises(UserError, match="no encoder"):
        quantize_model(torch.nn.Linear(2, 2), SETTINGS)
    with pytest.raises(UserError, match="evaluation mode"):
        calibrate(model, [make_batch()], lambda batch: model(batch, 3))
    with pytest.raises(UserError, match="at least one batch"):
        calibrate(model, [], model)
    with pytest.raises(UserError, match="compile"):
        model.encoder.layer_list()[0].compile_forward()
    batch = make_batch()
    hidden = torch.zeros(len(batch.tokens), CONFIG.hidden_size, dtype=torch.bfloat16)
    calibrate(model, [make_batch()], model)
    with pytest.raises(UserError, match="float32"):
        model.encoder(hidden, batch.layout, None)
