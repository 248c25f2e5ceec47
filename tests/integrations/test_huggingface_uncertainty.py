"""Closed-form covariances and variance temperatures in the transformers of Hugging Face."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers

from gpseq.integrations.huggingface import load_pretrained
from gpseq.nn import calibrate, diagnose, fit_covariance
from gpseq.nn.capture import layers_with_keys, look_through
from gpseq.nn.residual import ResidualGP
from gpseq.prediction import predict
from tests.integrations.test_huggingface import MODELS, REAL, SIZES, inputs, logits

SIZE = 24


def batches(name, dtype=torch.float32, seed=0):
    """Enough tokens for a few inducing keys."""
    torch.manual_seed(seed)
    if name == "vit":
        return [{"pixel_values": torch.randn(SIZE, 3, 8, 8, dtype=dtype)}]
    return [{"input_ids": torch.randint(1, 40, (SIZE, 7)), "attention_mask": REAL.repeat(SIZE // 3, 1)}]


def labelled(name, model, data):
    """The data with labels of the shape of its logits."""
    shape, classes = logits(model, data[0]).shape[:-1], 2
    return [{**batch, "labels": torch.randint(classes, shape)} for batch in data]


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_stays_and_variances_are_known(name, dtype):
    model = MODELS[name]().to(dtype).eval()
    data, other = batches(name, dtype), inputs(name, dtype)
    want = [logits(model, batch) for batch in (*data, other)]
    assert fit_covariance(model, data, num_inducing=6) is model
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    for batch, before in zip((*data, other), want, strict=True):
        torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=limit)
    assert all(layer.inducing.typical_variance.min() > 0 for layer in layers_with_keys(model).values())


def test_after_an_error_there_is_no_process_and_the_attention_is_its_own():
    model = MODELS["bert"]().eval()
    before, want = model.config.to_dict(), logits(model, inputs("bert"))
    with pytest.raises(ValueError, match="at least 99 distinct"):
        fit_covariance(model, [inputs("bert")], num_inducing=99)
    assert not any(isinstance(module, ResidualGP) for module in model.modules())
    assert model.config.to_dict() == before
    assert logits(model, inputs("bert")).equal(want)
    fit_covariance(model, batches("bert"), num_inducing=6)  # and it can be tried again


@pytest.mark.parametrize("name", MODELS)
def test_a_temperature_by_variance_is_saved_with_the_model(name, tmp_path):
    model = MODELS[name]().eval()
    data = batches(name)
    fit_covariance(model, data, num_inducing=6)
    found = calibrate(model, labelled(name, model, data))
    assert found.nlpd <= found.nlpd_temperature + 1e-9
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    one, two = (predict(m, data[0], "variance_temperature") for m in (model, loaded))
    torch.testing.assert_close(one.probs(), two.probs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.scores["temperature"], two.scores["temperature"], rtol=1e-5, atol=1e-6)
    assert len([key for key in one.scores if key.startswith("variance.")]) == 3


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_changes_no_score(name):
    model = MODELS[name]().eval()
    data = batches(name)
    calibrate(fit_covariance(model, data, num_inducing=6), labelled(name, model, data))
    one = dict(data[0])
    two = {**one, "input_ids": torch.where(one["attention_mask"].bool(), one["input_ids"], 39)}
    first, second = (predict(model, batch, "variance_temperature") for batch in (one, two))
    real = one["attention_mask"].bool() if name != "bert" else torch.ones(SIZE, dtype=torch.bool)
    torch.testing.assert_close(first.scores["temperature"][real], second.scores["temperature"][real])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_temperature_of_a_token_knows_nothing_of_the_future(name):
    model = MODELS[name]().eval()
    data = batches(name)
    for layer in layers_with_keys(fit_covariance(model, data, num_inducing=6)).values():
        layer.inducing.temperature.copy_(torch.tensor([0.2, 0.1, 2.0]))
    ids = data[0]["input_ids"]
    other = ids.clone()
    other[:, 4:] = torch.randint(1, 40, (SIZE, 3))
    one, two = (predict(model, {"input_ids": i}, "variance_temperature").scores["temperature"] for i in (ids, other))
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


def test_a_diagnosis_of_a_fitted_model():
    model = MODELS["bert"]().eval()
    data = batches("bert")
    fit_covariance(model, data, num_inducing=6)
    report = diagnose(model, data, show=False)
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["residual_gp"] * 3
    assert max(layer.variance_left for layer in report.layers) < 0.9


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    )  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=2, num_heads=2, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def two_berts():
    return transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(transformers.BertConfig(vocab_size=40, **SIZES)),
        decoder=transformers.BertLMHeadModel(
            transformers.BertConfig(vocab_size=40, is_decoder=True, add_cross_attention=True, **SIZES)
        ),
    )


def gpt2_that_reads():
    return transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(transformers.BertConfig(vocab_size=40, **SIZES)),
        decoder=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                add_cross_attention=True,
            )
        ),
    )  # fmt: skip


@pytest.mark.parametrize("make", [bart, t5, two_berts, gpt2_that_reads])
def test_padded_sources_are_not_padded_targets(make):
    model = make().eval()
    target = REAL.flip(0).bool()
    batch = {
        "input_ids": torch.randint(3, 40, (3, 7)),
        "attention_mask": REAL,
        "decoder_input_ids": torch.randint(3, 40, (3, 7)),
        "decoder_attention_mask": REAL.flip(0),
    }
    want = logits(model, batch)
    fit_covariance(model, [batch], num_inducing=4)
    torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=1e-5)
    seen = {}
    layers = look_through(model, [batch], lambda name, sight: seen.update({name: sight}))
    cross = {name for name in layers if "crossattention" in name or "encoder_attn" in name or "EncDec" in name}
    assert {name for name, sight in seen.items() if not sight.is_self} == cross
    assert 2 <= len(cross) < len(layers) / 2
    for name, sight in seen.items():
        in_encoder = name.startswith(("encoder.", "model.encoder."))
        assert sight.present.equal(REAL.bool() if in_encoder else target), name


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_what_was_fitted_is_loaded_in_its_precision(half, tmp_path):
    model = MODELS["bert"]().eval()
    fit_covariance(model, batches("bert"), num_inducing=6)
    want = [layer.inducing.typical_variance.clone() for layer in layers_with_keys(model).values()]
    for cast in (False, True):
        (model.to(half) if cast else model).save_pretrained(tmp_path / str(cast))
        loaded = load_pretrained(tmp_path / str(cast), dtype=half)
        for layer, before in zip(layers_with_keys(loaded).values(), want, strict=True):
            assert layer.inducing.location.dtype == half
            assert layer.inducing.typical_variance.equal(before)


def test_a_model_of_a_time_without_fits_is_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    model = MODELS["bert"]().eval()
    fit_covariance(model, batches("bert"), num_inducing=6)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {key: value for key, value in state.items() if not key.endswith(("typical_variance", "temperature"))}
    assert len(old) == len(state) - 6
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, inputs("bert")), logits(model, inputs("bert")))
    for layer in layers_with_keys(loaded).values():
        assert not layer.inducing.typical_variance.any() and not layer.inducing.temperature.any()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["gpseq"]["layers"]
