"""Diagnosis: models that have collapsed, one in each way, and numbers against slow ones."""

import math

import pytest
import torch
from torch import nn

from gpseq.nn import SGPAttention, calibrate, diagnose, fit_covariance, kl_divergence, use_sampling
from gpseq.nn.capture import layers_with_keys


class Model(nn.Module):
    """An encoder with a head for sequences."""

    def __init__(self, depth=2):
        super().__init__()
        stock = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dtype=torch.float64)
        self.encoder = nn.TransformerEncoder(stock, depth, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


def healthy(x, noise=0.5, **options):
    torch.manual_seed(1)
    model = fit_covariance(Model(), [x], num_inducing=16, noise=noise, **options)
    for layer in layers_with_keys(model).values():
        layer.sampling = "marginal"
    return model


def data(n=40):
    return torch.randn(n, 6, 8, dtype=torch.float64)


def test_a_healthy_model():
    x = data()
    report = diagnose(healthy(x), [x], show=False)
    assert not report.collapsed
    assert [layer.words for layer in report.layers] == ["healthy", "healthy"]
    assert report.shift > 1e-3
    assert [layer.name for layer in report.layers] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


def test_noise_to_signal_is_what_was_asked_of_the_fit():
    x = data()
    report = diagnose(healthy(x, noise=0.3), [x], show=False)
    # The fit holds it for every head, the diagnosis is of all heads together.
    for layer in report.layers:
        assert layer.noise_to_signal == pytest.approx(0.3, rel=1e-5)


def test_numbers_against_draws():
    """Noise by the spread of many draws of the heads themselves, divergence by the layer's own."""
    x = data(30)
    model = Model(1)
    model.encoder.layers[0].self_attn = SGPAttention(8, 2, num_inducing=4, batch_first=True, dtype=torch.float64)
    layer = model.encoder.layers[0].self_attn
    layer.value_weight.data.normal_()
    report = diagnose(model, [x], show=False).layers[0]
    tokens = model.encoder.layers[0].norm1(x)
    q = layer.posterior(tokens, tokens, tokens)
    draws = q.rsample(torch.Size([400])).detach()  # (S, B, H, T, D)
    noise = draws.var(0).mean()
    signal = q.mean.detach().transpose(0, 1).flatten(1, 2).var(1, correction=0).mean()
    assert report.noise_to_signal == pytest.approx((noise / signal).sqrt().item(), rel=0.02)
    model.eval()(x)
    assert report.kl == pytest.approx(kl_divergence(model, num_data=1, convention="per_sequence").item(), rel=1e-6)
    left = q.variance.mean() / layer.inducing.log_variance.exp().mean()
    assert report.variance_left == pytest.approx(left.item(), rel=1e-6)


def test_the_effect_is_that_of_a_model_without_the_layers_heads():
    x = data()
    model = healthy(x)
    found = diagnose(model, [x], show=False).layers[1].effect
    with use_sampling(model, "mean"):
        with_it = model.eval()(x).softmax(-1)
        layer = model.encoder.layers[1]
        h = model.encoder.layers[0](x)
        h = h + layer.self_attn.out_proj.bias
        h = h + layer.linear2(layer.activation(layer.linear1(layer.norm2(h))))
        without = model.head(h.mean(1)).softmax(-1)
    assert found == pytest.approx(0.5 * (with_it - without).abs().sum(-1).mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.log_variance.data.sub_(2 * math.log(100)), "collapsed: noise is 0.5% of the mean"),
        (lambda i: i.log_variance.data.add_(2 * math.log(30)), "collapsed: noise drowns the mean 15 times"),
        (lambda i: i.location.data.add_(100.0), "% of the prior variance is left"),
    ],
)
def test_each_way_to_collapse_is_told(change, words):
    x = data()
    model = healthy(x)
    change(model.encoder.layers[0].self_attn.inducing)
    report = diagnose(model, [x], show=False)
    assert report.collapsed
    assert words in report.layers[0].words
    assert report.layers[0].words.startswith("collapsed")
    assert report.layers[1].words == "healthy"


def test_attention_that_does_nothing():
    x = data()
    model = healthy(x)
    model.encoder.layers[1].self_attn.out_proj.weight.data.mul_(1e-6)
    assert "the same without this layer's mean" in diagnose(model, [x], show=False).layers[1].words


def test_draws_that_change_nothing():
    x = data()
    model = healthy(x, noise=0.06)
    model.head.weight.data.mul_(1e-4)
    report = diagnose(model, [x], show=False)
    assert report.collapsed
    assert "draws change nothing" in str(report)


def test_a_model_that_does_not_draw():
    x = data()
    model = fit_covariance(Model(), [x], num_inducing=16)
    report = diagnose(model, [x], show=False)
    assert report.shift is None
    assert not report.collapsed
    assert "No layer draws" in str(report)


def test_the_table_is_printed(capsys):
    x = data()
    report = diagnose(healthy(x), [x])
    out = capsys.readouterr().out
    assert out == str(report) + "\n"
    assert len(out.splitlines()) == 4
    assert "healthy" in out


def test_padding_and_batches_change_nothing():
    x = data()
    padding = torch.arange(6) >= torch.randint(2, 7, (40, 1))
    padding[0] = False

    class Masked(Model):
        def forward(self, x, padding):
            present = ~padding.unsqueeze(-1)
            h = torch.where(present, self.encoder(x, src_key_padding_mask=padding), 0.0)
            return self.head(h.sum(1) / present.sum(1))

    model = fit_covariance(Masked(), [{"x": x, "padding": padding}], num_inducing=16)
    filled = torch.where(padding.unsqueeze(-1), 9.0, x)
    one = diagnose(model, [{"x": x, "padding": padding}], show=False)
    two = diagnose(
        model,
        [{"x": part, "padding": mask} for part, mask in zip(filled.split(15), padding.split(15), strict=True)],
        show=False,
    )
    for a, b in zip(one.layers, two.layers, strict=True):
        for number in ("noise_to_signal", "kl", "variance_left", "effect"):
            assert getattr(a, number) == pytest.approx(getattr(b, number), rel=1e-6)


def test_the_model_is_as_it_was():
    x = data()
    model = healthy(x).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnose(model, [x], show=False)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(layer.sampling == "marginal" for layer in layers_with_keys(model).values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_generator_makes_it_repeatable():
    x = data()
    model = healthy(x)
    one, two = (diagnose(model, [x], generator=torch.Generator().manual_seed(2), show=False).shift for _ in range(2))
    assert one == two


def test_what_cannot_be_diagnosed():
    x = data(4)
    with pytest.raises(ValueError, match="layers with inducing keys"):
        diagnose(Model(), [x])
    with pytest.raises(ValueError, match="at least one batch"):
        diagnose(healthy(data()), [])
    with pytest.raises(ValueError, match="num_samples"):
        diagnose(healthy(data()), [x], num_samples=0)


def test_after_calibration_nothing_has_collapsed():
    x = data(60)
    model = fit_covariance(Model(), [x], num_inducing=16)
    calibrate(model, [(x, torch.randint(3, (60,)))])
    assert not diagnose(model, [x], show=False).collapsed


@pytest.mark.cuda
def test_on_a_gpu():
    x = data()
    assert not diagnose(healthy(x).cuda(), [x], show=False).collapsed
