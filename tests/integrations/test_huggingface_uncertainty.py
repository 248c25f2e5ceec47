"""Closed-form covariances and variance temperatures in the transformers of Hugging Face."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from gpseq.integrations.huggingface import load_pretrained
from gpseq.nn import calibrate, diagnose, fit_covariance
from gpseq.nn.capture import layers_with_keys
from gpseq.nn.residual import ResidualGP
from gpseq.prediction import predict
from tests.integrations.test_huggingface import MODELS, REAL, inputs, logits

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
